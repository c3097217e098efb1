import numpy as np
import pytest

from experiments.forecasting import gru
from experiments.forecasting.baselines import BASELINES, ar, seasonal, var
from experiments.forecasting.encoding import Encoding
from experiments.study import data


@pytest.fixture(scope="module")
def scaled(simulated):
    """The study's series, scaled, by split."""
    trajectories = simulated.trajectories
    parts = data.split(len(trajectories))
    values = Encoding.fit(trajectories[parts.train]).scaled(trajectories).astype(np.float64)
    return {name: values[rows] for name, rows in zip(("train", "val", "test"), parts, strict=True)}


def squared(baseline, series):
    """The MSE of each sequence, (150), scored like the models."""
    return ((baseline(series[:, :70].round(2), 10) - series[:, 70:80]) ** 2).mean(axis=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first_ten", "mean", "median"),
    [
        ("persistence", (0.622, 0.258), (0.384, 0.467), (0.127, 0.165)),
        ("context mean", (0.256, 0.191), (0.231, 0.270), (0.079, 0.094)),
        ("seasonal naive", (0.0225, 0.0036), (0.0239, 0.0359), (0.0013, 0.0026)),
        ("AR", (0.0125, 0.0020), (0.0100, 0.031), (2.5e-4, 5.5e-4)),
        ("VAR", (0.0061, 0.0018), (0.0048, 0.017), (1.6e-4, 2.6e-4)),
    ],
)
def test_baselines_have_the_known_errors(scaled, name, first_ten, mean, median):
    val, test = (squared(BASELINES[name], scaled[split]) for split in ("val", "test"))
    assert [val[:10].mean(), test[:10].mean()] == pytest.approx(first_ten, rel=0.1)
    assert [val.mean(), test.mean()] == pytest.approx(mean, rel=0.1)
    assert [np.median(val), np.median(test)] == pytest.approx(median, rel=0.12)


def test_autoregressions_continue_waves_and_stay_between_zero_and_one_and_a_half_times_the_maximum():
    t = np.arange(60)
    wave = np.stack([2 + np.sin(t / 3), 2 + np.cos(t / 5)], axis=1)[None]
    growing = np.stack([np.exp(np.arange(50) / 5), np.arange(50.0)[::-1]], axis=1)[None]
    for baseline in (ar, var):
        np.testing.assert_allclose(baseline(wave[:, :50], 10), wave[:, 50:], atol=0.02)
        forecast = baseline(growing, 30)
        assert forecast.shape == (1, 30, 2)
        assert (forecast >= 0).all()
        assert (forecast <= 1.5 * growing.max(axis=1)).all()


def test_the_seasonal_baseline_repeats_a_fractional_period_or_the_given_one():
    """A season that is longer than the context is the whole context."""
    t = np.arange(90)
    wave = np.stack([2 + np.sin(2 * np.pi * t / 12.3), 2 + np.cos(2 * np.pi * t / 12.3)], axis=1)[None]
    np.testing.assert_allclose(seasonal(wave[:, :60], 30), wave[:, 60:], atol=0.08)
    context = np.random.default_rng(0).random((1, 20, 2))
    np.testing.assert_allclose(seasonal(context, 15, 7)[0], context[0, [*range(13, 20)] * 3][:15])
    np.testing.assert_allclose(seasonal(context, 3, 50)[0], context[0, :3])


@pytest.mark.slow
def test_the_network_beats_the_context_mean_and_depends_on_the_seed_alone(monkeypatch, scaled):
    monkeypatch.setattr(gru, "STEPS", 150)  # instead of 2000
    forecast = gru.fit(scaled["train"].round(2))
    assert (forecast(scaled["val"][:, :70], 10) >= 0).all()
    errors = squared(forecast, scaled["val"])
    assert errors.mean() < 0.5 * squared(BASELINES["context mean"], scaled["val"]).mean()
    assert np.median(errors) < 0.006
    monkeypatch.setattr(gru, "STEPS", 3)
    train = scaled["train"][:5]
    first, again, other = (gru.fit(train, seed)(train[:, :40], 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
