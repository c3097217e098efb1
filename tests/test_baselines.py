import numpy as np
import pytest

from experiments.forecasting import gru
from experiments.forecasting.baselines import ar, context_mean, persistence, seasonal, var
from experiments.forecasting.encoding import Encoding
from experiments.study import data


@pytest.fixture(scope="module")
def split_errors(simulated):
    """A function of a baseline: its MSE of each sequence, (150), on validation and on test, scored like the models."""
    trajectories = simulated.trajectories
    parts = data.split(len(trajectories))
    scaled = Encoding.fit(trajectories[parts.train]).scaled(trajectories).astype(np.float64)

    def errors(baseline):
        return [
            ((baseline(scaled[rows, :70].round(2), 10) - scaled[rows, 70:80]) ** 2).mean(axis=(1, 2))
            for rows in (parts.val, parts.test)
        ]

    return errors


@pytest.mark.parametrize(
    ("baseline", "first_ten", "mean", "median"),
    [
        (persistence, (0.622, 0.258), (0.384, 0.467), (0.127, 0.165)),
        (context_mean, (0.256, 0.191), (0.231, 0.270), (0.079, 0.094)),
        (ar, (0.0125, 0.0020), (0.0100, 0.031), (2.5e-4, 5.5e-4)),
        (var, (0.0061, 0.0018), (0.0048, 0.017), (1.6e-4, 2.6e-4)),
    ],
)
def test_baselines_have_the_known_errors(split_errors, baseline, first_ten, mean, median):
    val, test = split_errors(baseline)
    assert [val[:10].mean(), test[:10].mean()] == pytest.approx(first_ten, rel=0.1)
    assert [val.mean(), test.mean()] == pytest.approx(mean, rel=0.1)
    assert [np.median(val), np.median(test)] == pytest.approx(median, rel=0.12)


def test_autoregressions_continue_autoregressive_series():
    t = np.arange(60)
    wave = np.stack([2 + np.sin(t / 3), 2 + np.cos(t / 5)], axis=1)[None]
    for baseline in (ar, var):
        np.testing.assert_allclose(baseline(wave[:, :50], 10), wave[:, 50:], atol=0.02)


def test_autoregressions_stay_between_zero_and_one_and_a_half_times_the_maximum():
    growing = np.stack([np.exp(np.arange(50) / 5), np.arange(50.0)[::-1]], axis=1)[None]
    for baseline in (ar, var):
        forecast = baseline(growing, 30)
        assert forecast.shape == (1, 30, 2)
        assert (forecast >= 0).all()
        assert (forecast <= 1.5 * growing.max(axis=1)).all()


def test_the_seasonal_baseline_repeats_a_fractional_period():
    t = np.arange(90)
    wave = np.stack([2 + np.sin(2 * np.pi * t / 12.3), 2 + np.cos(2 * np.pi * t / 12.3)], axis=1)[None]
    np.testing.assert_allclose(seasonal(wave[:, :60], 30), wave[:, 60:], atol=0.08)


def test_a_lag_fitted_to_the_end_beats_one_fitted_to_the_whole_context(split_errors):
    for squared, whole_context_mse in zip(split_errors(seasonal), (0.037, 0.063), strict=True):
        assert squared.mean() < whole_context_mse


def test_the_network_beats_the_context_mean(monkeypatch, simulated):
    monkeypatch.setattr(gru, "STEPS", 150)  # instead of 2000
    parts = data.split(len(simulated.trajectories))
    scaled = Encoding.fit(simulated.trajectories[parts.train]).scaled(simulated.trajectories).astype(np.float64)
    forecast = gru.fit(scaled[parts.train].round(2))
    context, truth = scaled[parts.val, :70], scaled[parts.val, 70:80]
    values = forecast(context, 10)
    assert values.shape == truth.shape
    assert (values >= 0).all()
    squared = ((values - truth) ** 2).mean(axis=(1, 2))
    assert squared.mean() < 0.5 * ((context_mean(context, 10) - truth) ** 2).mean()
    assert np.median(squared) < 0.006


def test_the_network_depends_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr(gru, "STEPS", 3)
    train = np.random.default_rng(0).uniform(0, 9, size=(5, 60, 2))
    first, again, other = (gru.fit(train, seed)(train[:, :40], 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
