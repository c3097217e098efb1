import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.forecasting import gru
from experiments.forecasting.baselines import ar, seasonal, var
from experiments.forecasting.encoding import Encoding
from experiments.study import data

KEPT = Path(__file__).parents[1] / "results/quick/baselines.json"


def squared(baseline, series):
    """The MSE of each sequence, (150), scored like the models."""
    return ((baseline(series[:, :70].round(2), 10) - series[:, 70:80]) ** 2).mean(axis=(1, 2))


def test_autoregressions_continue_waves_and_stay_between_zero_and_one_and_a_half_times_the_maximum():
    t = np.arange(60)
    wave = np.stack([2 + np.sin(t / 3), 2 + np.cos(t / 5)], axis=1)
    growing = np.stack([np.exp(np.arange(50) / 5), np.arange(50.0)[::-1]], axis=1)
    for baseline in (ar, var):
        np.testing.assert_allclose(baseline(wave[:50], 10), wave[50:], atol=0.02)
        forecast = baseline(growing, 30)
        assert ((forecast >= 0) & (forecast <= 1.5 * growing.max(axis=0))).all()


def test_the_seasonal_baseline_repeats_a_fractional_period_or_the_given_one():
    """A season that is longer than the context is the whole context."""
    t = np.arange(90)
    wave = np.stack([2 + np.sin(2 * np.pi * t / 12.3), 2 + np.cos(2 * np.pi * t / 12.3)], axis=1)
    np.testing.assert_allclose(seasonal(wave[:60], 30), wave[60:], atol=0.08)
    context = np.random.default_rng(0).random((20, 2))
    np.testing.assert_allclose(seasonal(context, 15, 7), context[[*range(13, 20)] * 3][:15])
    np.testing.assert_allclose(seasonal(context, 3, 50), context[:3])


def in_the_text(trajectories):
    """The series of each part, scaled: (N, 100, 2); those to train on in the digits of the text."""
    parts = data.split(1000)
    scaled = Encoding.fit(trajectories[parts.train]).scaled(trajectories).astype(np.float64)
    return scaled[parts.train].round(2), scaled[parts.val], scaled[parts.test]


def test_the_network_of_the_study_need_not_be_trained_again(simulated, monkeypatch):
    train, _, test = in_the_text(simulated)
    monkeypatch.setattr(gru, "fit", lambda series, seed, steps, progress: (seed, steps))
    network = gru.load_or_fit(train, 0)
    kept = json.loads(KEPT.read_text())["GRU trained on the 700"]["test"]["all"]
    assert squared(network.forecast, test).mean() == pytest.approx(kept["mse"], rel=1e-3)
    assert gru.load_or_fit(train, 1) == (1, gru.STEPS)
    assert gru.load_or_fit(train[:-1], 0) == (0, gru.STEPS)


@pytest.mark.slow
def test_the_network_beats_the_context_mean_and_depends_on_the_seed_alone(simulated):
    train, val, _ = in_the_text(simulated)
    forecast = gru.fit(train, steps=150).forecast
    means = val[:, :70].round(2).mean(axis=1, keepdims=True)
    assert squared(forecast, val).mean() < 0.5 * ((means - val[:, 70:80]) ** 2).mean()
    made = []
    for seed in (0, 0, 1):
        made.append(gru.fit(train[:5], seed, 3).forecast(train[:5, :40], 4))
        torch.rand(1)  # draws that others make change nothing
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
