"""The forecaster that reads numbers: what its decoder sees, and what its forecasts promise."""

from copy import deepcopy
from statistics import NormalDist

import numpy as np
import pytest
import torch

from experiments.forecasting import Forecaster
from experiments.forecasting.contexts import SeriesError
from experiments.forecasting.numbers import LEVELS, Numbers, Patches, patches
from experiments.forecasting.scores import inside
from experiments.forecasting.seasons import find_seasons, long_season, without_long_seasons
from experiments.forecasting.values import NumberForecaster, at_levels
from experiments.training.number_tuning import number_step
from experiments.training.settings import NUMBER_TARGETS
from lora import LoraConfig, inject


@pytest.fixture(scope="module")
def model() -> Numbers:
    """Random weights in all parts, also in those that begin at zero."""
    model = Numbers()
    model.start(seed=0)
    generator = torch.Generator().manual_seed(1)
    for part in (model.head, model.skip, *(mix.down_proj for mix in model.mixes)):
        torch.nn.init.normal_(part.weight, std=0.03, generator=generator)
    return model


def wave(length: int, period: float, seed: int = 0, noise: float = 0.1) -> np.ndarray:
    """A noisy sine (T) on a slope."""
    t = np.arange(length)
    return np.sin(2 * np.pi * t / period) + 0.01 * t + noise * np.random.default_rng(seed).normal(size=length)


def test_seasons_are_found_in_noise_trends_and_gaps():
    """Of lags that no two values are apart, rounding would make any number: an autocorrelation is at most 1."""
    rng = np.random.default_rng(3)
    for x, seen, wanted in (
        (wave(96, 12), np.ones(96), [12, 12]),
        (wave(96, 12), rng.random(96) > 0.2, [12, 12]),
        (wave(500, 24) + (np.arange(500) // 24 % 7 == 0) * 3, np.ones(500), [168, 168]),
        (np.arange(50.0), np.ones(50), [1, 1]),
    ):
        assert find_seasons(torch.from_numpy(x), torch.from_numpy(seen).bool()).periods.tolist() == wanted
    x, seen = (torch.from_numpy(one) for one in (rng.normal(size=(500, 54)).cumsum(-1), rng.random((500, 54)) < 0.3))
    strengths = find_seasons(x.float() * seen, seen).strengths
    assert 0 < strengths.max() <= 1


def test_a_token_sees_nothing_of_what_follows_and_of_what_is_missing(model):
    x, seen = torch.from_numpy(wave(64, 12)).float()[None, None], torch.ones(1, 1, 64, dtype=torch.bool)
    seen[..., 30] = False
    seasons = find_seasons(x, seen)
    changed = x.clone()
    changed[..., 30], changed[..., 41:] = 100.0, -7.0
    before, after = (model(patches(one, seen, seasons, 2)) for one in (x, changed))
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_variables_see_each_other_through_the_gate_alone(model):
    x = torch.from_numpy(np.stack([wave(64, 12), wave(64, 7, 1)]))[None].float()
    seen = torch.ones_like(x, dtype=torch.bool)
    read = patches(x, seen, find_seasons(x, seen), 2)
    alone = Patches(read.features[:, :1], read.newest[:, :1], read.ends)
    assert not torch.allclose(model(read)[:, :1], model(alone))
    assert torch.allclose(model(read, torch.zeros(1))[:, :1], model(alone), atol=1e-6)


@pytest.fixture(scope="module")
def forecaster(model) -> NumberForecaster:
    """A forecaster with random weights: what it promises holds for any."""
    return NumberForecaster(model)


def test_a_forecast_depends_on_its_series_alone_and_moves_with_it(forecaster):
    series = [wave(length, 12, length)[:, None] for length in (3, 40, 41, 42, 100, 300, 700)]
    together = forecaster.forecast(series, 40, quantiles=(0.1, 0.9))
    for number, one in enumerate(series):
        alone = forecaster.forecast([one], 40, quantiles=(0.1, 0.9))
        moved = forecaster.forecast([one * 1e6 - 3e7], 40)
        np.testing.assert_allclose(together.values[number], alone.values[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose((moved.values[0] + 3e7) / 1e6, alone.values[0], rtol=0, atol=1e-3)


SERIES = {
    "three steps": [1, 2, 4],
    "constant": [5.0] * 30,
    "one value but for the last": [7.0] * 40 + [8.0],
    "tiny": wave(50, 7) * 1e-300,
    "huge": wave(50, 7) * 1e299,
    "gaps of 90 %": np.where(np.random.default_rng(0).random(200) < 0.9, np.nan, wave(200, 12)),
    "100,000 steps": wave(100_000, 168),
    "one value": [np.nan, 3.0, np.nan],
}


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES.keys())
def test_any_series_gets_finite_ordered_quantiles(forecaster, series):
    """Of one step, of a pass of the decoder, and far beyond."""
    for horizon in (1, 33, 200):
        found = forecaster.forecast([np.asarray(series)], horizon, quantiles=(0.02, 0.1, 0.5, 0.9, 0.98))
        assert found.quantiles.shape == (1, 5, horizon, 1)
        assert np.isfinite(found.quantiles).all()
        assert (np.diff(found.quantiles, axis=1) >= 0).all()
        np.testing.assert_allclose(found.values, found.quantiles[:, 2])


HOURS = np.arange(24 * 7 * 8)
LOAD = (np.sin(2 * np.pi * HOURS / 24) + 2) * np.where(HOURS // 24 % 7 < 5, 1, 0.7)  # working days and weekends
WANDERING = [LOAD + 0.03 * np.random.default_rng(seed).normal(size=len(LOAD)).cumsum() for seed in range(4)]
NOISE = np.random.default_rng(5).normal(size=len(LOAD))
KNOWN = np.random.default_rng(6).random(len(LOAD)) > 0.1


def test_a_long_season_is_found_only_where_there_is_one():
    with_gaps, with_spike = np.where(KNOWN, LOAD, np.nan), np.where(HOURS == 1300, 60.0, LOAD)
    with_outage = np.where(HOURS // 30 == 38, 0, LOAD)
    for some in (with_gaps, with_spike, with_outage, LOAD + 0.2 * NOISE, LOAD[:504], LOAD + 1e7, 1e300 * LOAD):
        assert long_season(some, 512) in (168, 336)
    smooth, spikes = np.convolve(NOISE, np.hanning(300), "valid"), 60.0 * (NOISE > 3)
    few = np.where(KNOWN, np.nan, NOISE)  # by any lag, some of their pairs are alike
    for some in (LOAD[:480], wave(600, 24), NOISE, NOISE.cumsum(), smooth, spikes, np.full(600, np.nan), few):
        assert long_season(some, 512) == 0
    exact = np.resize([1, 5, 2, 7, 0, 0, 3], 150)  # multiples of its season are long
    assert [long_season(factor * exact, 512) > 0 for factor in (1, 3.7)] == [True, True]
    beside = np.stack([WANDERING[0], NOISE.cumsum(), np.ones(1344)], axis=1)  # they have no long season
    less, raised = without_long_seasons(beside, 24, 512)
    assert (len(less), raised[:, 1:].tolist()) == (1344 - 504, [[0, 0]] * 24)
    late = np.where(HOURS < 840, np.nan, LOAD)  # three weeks, beside eight
    less, _ = without_long_seasons(np.stack([LOAD, late], axis=1), 24, 512)
    assert (long_season(late, 512), less.shape) == (168, (168, 2))
    np.testing.assert_allclose(less, 0, atol=1e-9)


def test_the_week_of_hourly_values_is_forecast():
    """Where the decoder reads days alone, its error is three times seasonal naive's."""
    places = [(one, stop) for one in WANDERING for stop in range(len(LOAD) - 96, len(LOAD), 24)]
    found = Forecaster.load().forecast([one[:stop] for one, stop in places], 24, quantiles=(0.1, 0.9))
    truth, naive = (np.stack([one[stop - back :][:24] for one, stop in places]) for back in (0, 168))
    assert np.abs(found.values[..., 0] - truth).mean() < 0.6 * np.abs(naive - truth).mean()
    assert 0.7 < inside(*found.quantiles[..., 0].swapaxes(0, 1), truth) < 0.95
    one = Forecaster.load().forecast([np.where(KNOWN, WANDERING[0], np.nan)], 400).values  # far beyond a season
    assert np.corrcoef(np.diff(one[0, :, 0]), np.diff(LOAD[:400]))[0, 1] > 0.9


def test_a_neighbour_that_ends_early_changes_no_interval():
    days = LOAD + np.random.default_rng(6).normal(0, 0.15, len(LOAD) // 24).repeat(24)
    late = np.append(NOISE[:200], np.full(100, np.nan))
    alone, both = (Forecaster.load().forecast(some, 6, quantiles=(0.1,)) for some in ([days], [days, late]))
    np.testing.assert_allclose(both.quantiles[0], alone.quantiles[0], rtol=1e-6)


def test_baselines_read_what_an_early_variable_is_forecast_to_be():
    """Not its last value, repeated: in a fine-tuned forecast, AR then had eight times its error."""
    early = wave(90, 12)[:, None] * [1, 2]
    early[80:, 1] = np.nan
    found = Forecaster.load().parts([early], 5, ["zero-shot", "AR"])
    np.testing.assert_allclose(found["AR"][0, 0, :, 1], 2 * wave(95, 12)[90:], atol=0.6)


def test_intervals_are_wide_enough_where_days_differ_as_a_whole():
    """Of such weeks, 80 % intervals held 64 %, before forecasts of earlier days were tried; with gaps then 72.5 %."""
    days = [LOAD + np.random.default_rng(seed).normal(0, 0.15, len(LOAD) // 24).repeat(24) for seed in range(6)]
    places = [(one + 0.02 * NOISE, stop) for one in days for stop in range(len(LOAD) - 120, len(LOAD), 24)]
    truth = np.stack([one[stop : stop + 24] for one, stop in places])
    for known in (np.full(len(LOAD), True), np.random.default_rng(7).random(len(LOAD)) > 0.5):
        pasts = [np.where(known, one, np.nan)[:stop] for one, stop in places]
        found = Forecaster.load().forecast(pasts, 24, quantiles=(0.1, 0.9)).quantiles
        assert 0.73 < inside(*found[..., 0].swapaxes(0, 1), truth) < 0.9


@pytest.mark.slow
def test_intervals_far_ahead_do_not_shrink():
    """Of random walks, 80 % intervals of steps 65 to 100 held 48 %, of noise 73 %."""
    rng = np.random.default_rng(5)
    noise, walks = rng.normal(size=(16, 396)), rng.normal(size=(16, 396)).cumsum(1)
    for series, least, most in ((noise, 0.8, 0.95), (walks, 0.6, 0.9)):
        found = Forecaster.load().forecast([*series[:, :300]], 96, quantiles=(0.1, 0.9))
        assert least < inside(*found.quantiles[:, :, 64:, 0].swapaxes(0, 1), series[:, 364:]) < most


def test_values_that_are_not_there_yet_are_forecast_on_the_way(forecaster):
    """Of a series whose last rows are empty, as of one that ends there; masked values are missing ones."""
    series, empty = wave(60, 7), np.full(14, np.nan)
    masked = np.ma.masked_greater(np.concatenate((series, [1e9] * 14)), 1e8)
    whole = forecaster.forecast([series], 21, quantiles=(0.1,))
    for late in (np.concatenate((series, empty)), masked):
        found = forecaster.forecast([late, series], 7, quantiles=(0.1,))
        np.testing.assert_array_equal(found.values, [whole.values[0, 14:], whole.values[0, :7]])
        np.testing.assert_array_equal(found.quantiles[0], whole.quantiles[0, :, 14:])


def test_what_is_missing_at_an_end_is_not_read(forecaster):
    """Before the first value; of one variable before or after those of the others; a series that ended long ago."""
    wanted, series, empty = forecaster.forecast([wave(60, 7)], 5), wave(60, 7), np.full(200, np.nan)
    np.testing.assert_array_equal(forecaster.forecast([np.concatenate((empty, series))], 5).values, wanted.values)
    with pytest.raises(SeriesError, match="series 1: has no value in its newest 200 time steps"):
        forecaster.forecast([series, np.concatenate((series, empty))], 5)
    alone = forecaster.forecast([series[:-7]], 12, LEVELS).quantiles[0, :, :, 0]
    several = np.stack([series, wave(60, 12), np.full(60, 3.0)], axis=1)
    several[:40, 1], several[-7:, 0] = np.nan, alone[4, :7]
    forecast_ends = forecaster.forecast([several], 5).values
    several[-7:, 0] = several[30:, 2] = np.nan
    late = forecaster.forecast([several], 5, LEVELS).quantiles[0]
    np.testing.assert_array_equal(late[4], forecast_ends[0])
    np.testing.assert_allclose((late - late[4])[..., 0], (alone - alone[4])[:, 7:])  # as from where it ends
    other = several.copy()
    other[:20, [0, 2]] += 9  # before what is read
    found = [forecaster.forecast([one], 5, context=40).values for one in (several, other)]
    np.testing.assert_array_equal(*found)
    ended = np.stack([wave(400, 7), np.append(wave(200, 7), empty)], axis=1)
    with pytest.raises(SeriesError, match="series 0: variable 1 has no value in its newest 200 time steps; leave it"):
        forecaster.forecast([ended], 5)


def test_a_series_is_read_from_its_newest_long_gap_on(forecaster):
    old, new, gap = wave(100, 7), wave(60, 12), np.full(300, np.nan)

    def after(gap: np.ndarray, new: np.ndarray) -> np.ndarray:
        return forecaster.forecast([np.concatenate((old, gap, new))], 5).values

    alone = forecaster.forecast([new], 5).values
    np.testing.assert_array_equal(after(gap, new), alone)
    assert not np.allclose(after(gap[:100], new), alone)
    assert not np.allclose(after(gap[:140], new[:5]), forecaster.forecast([new[:5]], 5).values)


def test_other_levels_lie_on_the_lines_of_a_normal_distribution():
    normal, levels = NormalDist(3, 2), (0.01, 0.1, 0.25, 0.5, 0.93)
    known = np.array([normal.inv_cdf(level) for level in LEVELS])[None, :, None, None]
    wanted = [normal.inv_cdf(level) for level in levels]
    np.testing.assert_allclose(at_levels(known, levels)[0, :, 0, 0], wanted)


@pytest.mark.parametrize(
    ("shape", "rank", "flops"),
    [((3, 1, 7), 0, 127652254), ((2, 3, 36), 0, 1501755807), ((3, 1, 7), 4, 90060502), ((2, 2, 5), 4, 94778880)],
)
def test_a_step_costs_the_flops_of_its_operators(model, shape, rank, flops):
    """These integers were also found by formulas, as those of `flops.training` for the decoder of text."""
    adapted = deepcopy(model)
    if rank:
        inject(adapted, LoraConfig(rank, rank, NUMBER_TARGETS))
    assert number_step(adapted, *shape, masked=True) == flops


def test_a_zero_shot_forecast_is_the_mean_of_three_readings(forecaster):
    series = wave(60, 7)[:, None]
    read = [forecaster._by_decoder(forecaster.base, None, [series[-steps:]], 5) for steps in (60, 48, 36)]
    np.testing.assert_allclose(forecaster.forecast([series], 5, LEVELS).quantiles, np.mean(read, axis=0), rtol=1e-9)
