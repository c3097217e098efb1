"""Fine-tuning of the decoder that reads values: what it reads, what its forecasts are made of, budgets and kills."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from experiments import training
from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import AdapterError, Reading, Trained, read_trained
from experiments.forecasting.backtest import Origin, split
from experiments.forecasting.contexts import SeriesError, SeriesWarning
from experiments.forecasting.numbers import LEVELS
from experiments.forecasting.values import TUNED, ZERO_SHOT, Scale, combined
from experiments.training.finetuning import Finetuning
from experiments.training.number_tuning import NumberWindows, best_shares, noise, with_scale
from experiments.training.settings import Training, TrainingError


def patterns(count: int, steps: int = 60) -> list[np.ndarray]:
    """Series (T, 2) of one rule that no context tells: what rises, at any rate, falls back as it would pass 2."""
    rng = np.random.default_rng(0)
    rising = rng.uniform(0, 1, (count, 1)) + rng.uniform(0.03, 0.12, (count, 1)) * np.arange(steps)
    return [np.stack([1 + one % 1, 2 - one % 1], axis=1) for one in rising]


def test_series_of_other_levels_and_trends_share_no_scale():
    levels = [one * 10.0**number for number, one in enumerate(patterns(6))]
    for series in (levels, [np.arange(500.0)[:, None]]):
        assert with_scale(Reading(40, 4, 5), series) == Reading(40, 4, 5)


@pytest.mark.parametrize(("shift", "logarithms"), [(0.0, True), (-1.5, False)])
def test_a_shared_scale_is_undone_and_of_logarithms_where_values_are_positive(shift, logarithms):
    series = [one + shift for one in patterns(6)]
    reading = with_scale(Reading(40, 4, 5), series)
    assert [reading.offset is not None, reading.usual is not None] == [logarithms] * 2
    scale = Scale.recorded(reading)
    x = torch.from_numpy(np.stack(series)).mT
    z = scale.normalise(x)
    np.testing.assert_allclose(scale.restore(z[:, :, None])[:, :, 0], x, atol=1e-5)
    step = 1e-4
    slope = (scale.restore(z[:, :, None] + step) - scale.restore(z[:, :, None] - step))[:, :, 0] / (2 * step)
    np.testing.assert_allclose(scale.slope(x), slope, rtol=2e-2)


SETTINGS = Training(0, 1e-3, 4, 5, batch=4, reads="numbers")


def windows_of(series, scaled: bool = True) -> NumberWindows:
    reading = with_scale(Reading(16, 4, 5), series) if scaled else Reading(16, 4, 5)
    return NumberWindows(Forecaster.load("numbers").model, series, reading, SETTINGS)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_batch_in_parts_has_the_loss_of_the_whole(scaled):
    """A part counts by the weight of what it forecasts."""
    windows = windows_of([*patterns(3), patterns(1, 12)[0]], scaled)
    rows = windows.rows(3, SETTINGS)
    parts = [(windows.loss(part).item(), windows.num_targets(part)) for part in rows.chunk(2)]
    mean = sum(loss * weight for loss, weight in parts) / windows.num_targets(rows)
    assert windows.loss(rows).item() == pytest.approx(mean, rel=1e-5)


def test_windows_end_at_all_times_and_ask_only_for_what_is_known():
    series = [np.arange(30.0)[:, None] + 1, np.arange(9.0)[:, None] + 1]
    windows = windows_of(series)
    last = set()
    for draw in range(200):
        x, begin, prefix = windows._draw(draw % 2, draw)
        known = np.flatnonzero(~np.isnan(x[0]))
        assert np.array_equal(known, np.arange(begin, windows.length + windows.reading.ahead))
        assert 1 <= prefix <= windows.length - begin
        values = x[0, known] / (x[0, known[1]] - x[0, known[0]])  # the series is stretched
        np.testing.assert_allclose(values, values[0].round() + np.arange(len(known)))
        last.add((draw % 2, values[-1].round()))
        _, _, weight = windows._batch(torch.tensor([[draw % 2, draw]]))
        assert weight.sum() > 0
        assert (weight[..., windows.reading.ahead :] == 0).all()
    assert last == {(0, end) for end in range(21, 31)} | {(1, 8), (1, 9)}


def test_noise_is_what_a_regression_leaves_and_large_values_count_more_only_without_it():
    """Weights that grow with a noisy truth would lead to too high forecasts."""
    rng = np.random.default_rng(0)
    waves = np.sin(0.3 * np.arange(200) + rng.uniform(0, 6, (5, 1)))
    exact, noisy = [4 + waves[:, :, None], 1.1 + 9 * rng.random((5, 200, 1))]
    assert noise([one.T for one in exact]) < 0.001
    assert noise([one.T for one in noisy]) == pytest.approx(0.5, abs=0.05)  # changes have twice the variance
    assert noise([rng.normal(size=(1, 3000)).cumsum(axis=1)]) == pytest.approx(1, abs=0.05)  # of a walk, all changes
    assert noise([one[:20].T for one in exact]) == 1  # too few values to tell
    for series, grows in ((exact, True), (noisy, False)):
        weight = windows_of([*series])._batch(torch.tensor([[0, 0], [1, 1]]))[-1]
        assert (len(weight[weight > 0].unique()) > 1) == grows


def test_shares_are_those_with_the_smallest_loss_and_chance_keeps_the_zero_shot_forecast():
    rng = np.random.default_rng(0)
    held = [Origin(rng.normal(size=(20, 1)), rng.normal(size=(3, 1)), number, number) for number in range(20)]
    truth = np.stack([place.truth for place in held])[:, None]
    spread = np.array([NormalDist(0, 0.3).inv_cdf(level) for level in LEVELS])[:, None, None]
    error = np.random.default_rng(2).normal(0, 0.3, truth.shape)
    ar = truth - np.array([1, 1, 0])[:, None]
    parts = {TUNED: truth + 1 + spread, ZERO_SHOT: truth + 9 * error + spread, "AR": ar}
    found = best_shares(parts, held, Reading(16, 4, 3))
    assert (found.near, found.far) == ({TUNED: 0.5, "AR": 0.5}, {"AR": 1.0})
    assert found.shares.startswith("50 % fine-tuned, 50 % AR in the first 2 steps, then 100 % AR, as was best")
    assert found.width == 1 / 16
    np.testing.assert_allclose(combined(parts, found)[:, 4], truth[:, 0])
    only = replace(found, near={"AR": 1.0})  # the interval is that of the decoder that the forecast then makes, too
    untuned = {name: part for name, part in parts.items() if name != TUNED}
    np.testing.assert_array_equal(combined(parts, only), combined(untuned, only))
    few = [place._replace(series=place.series % 4, group=place.group % 4) for place in held]
    assert best_shares(parts, few, Reading(16, 4, 3)).width == 1  # forecasts of so few series decide no interval
    uneven = truth + np.where(np.arange(20) % 4, 0.001, 0.3)[:, None, None, None]  # three quarters are almost right
    parts = {TUNED: uneven + spread, ZERO_SHOT: uneven + 9 + spread}
    # the narrowest whose interval holds 80 %; that with the smallest loss holds 75 %
    assert best_shares(parts, held, Reading(16, 4, 3)).width == 2**-0.25
    kept = replace(found, near={ZERO_SHOT: 1.0}, far={ZERO_SHOT: 1.0}, width=1.0)
    parts = {TUNED: truth + error + 1e-3 * error[::-1] + spread, ZERO_SHOT: truth + error + spread}
    assert best_shares(parts, held, found) == kept
    parts = {TUNED: truth[:1] + spread, ZERO_SHOT: truth[:1] + 5 + spread}
    assert best_shares(parts, held[:1], found) == kept


BELOW_ZERO = [np.append(one - one.mean(axis=0), np.full((60, 1), 0.1), axis=1) for one in patterns(24)]


@pytest.mark.parametrize(("series", "changes"), [
    (patterns(24), [(1, -1.1), (1e-4, 0), ([1e-4, 1], 0), ([1, 1e4], 0)]),  # read as logarithms
    (BELOW_ZERO, [([1, 1e-3, 1], 0), (1, [1e4, 1e4, 0]), (1, [0, 0, 0.01])]),  # the third variable is a constant
])  # fmt: skip
def test_series_on_another_scale_are_forecast_without_the_adapter(series, changes):
    tuned, zero_shot = Forecaster.load("numbers"), Forecaster.load("numbers")
    tuned.copied().norm.weight.data *= 1.5  # as an adapter changes it
    reading = with_scale(Reading(40, 8, 4, near={TUNED: 1.0}, far={TUNED: 1.0}, width=1 / 8), series)
    tuned.trained = Trained("numbers", "", reading=reading)
    series = [series[0], *(factor * series[0] + offset for factor, offset in changes)]
    with pytest.warns(SeriesWarning, match=rf"series 1 is negative, or on .* without it \({len(changes)} such"):
        found = tuned.forecast(series, 4, [0.1, 0.9]).quantiles
    wanted = zero_shot.forecast(series, 4, [0.1, 0.9]).quantiles
    same = np.isclose(found, wanted, rtol=1e-4).all(axis=(1, 2, 3))
    assert same.tolist() == [False] + [True] * len(changes)


@pytest.mark.slow
def test_fine_tuning_helps_where_there_is_something_to_learn_and_its_adapter_forecasts(tmp_path):
    series, forecaster = patterns(24), Forecaster.load("numbers")
    contexts = [one[:40] for one in series]
    zero_shot = forecaster.forecast(contexts, 4)
    metrics = training.finetune(forecaster, series, 4, folder=tmp_path, steps=30, batch=8)
    assert metrics["errors"]["after"]["rmse"] < 0.7 * metrics["errors"]["before"]["rmse"]
    assert metrics["held_out_after"] < 0.8 * metrics["held_out_before"]
    assert read_trained(tmp_path / "adapter").reading.shares == metrics["shares"]
    loaded = Forecaster.load(adapter=tmp_path / "adapter")
    ours, theirs = (one.forecast(contexts, 4, [0.1, 0.9]) for one in (forecaster, loaded))
    np.testing.assert_array_equal(ours.quantiles, theirs.quantiles)
    assert not np.allclose(ours.values, zero_shot.values)
    with pytest.warns(SeriesWarning, match="the adapter was trained to forecast 4 time steps, not 50: intervals of"):
        assert np.isfinite(loaded.forecast(contexts, 50).values).all()
    with pytest.raises(SeriesError, match="have 1 variables, the adapter was trained on 2"):
        loaded.forecast([np.arange(20.0)], 4)
    late = np.append(series[0], np.full((9, 2), np.nan), axis=0)  # more than is read below
    np.testing.assert_array_equal(loaded.forecast([late], 4, context=8).values.shape, (1, 4, 2))
    large = loaded.parts([100 * series[0], 200 * series[0]], 4, [TUNED], loaded.trained.reading)[TUNED]
    np.testing.assert_allclose(large[1], 2 * large[0])  # both are read as if they had the usual values
    (tmp_path / "adapter" / "encoding.json").unlink()
    with pytest.raises(AdapterError, match="does not record how it reads values"):
        Forecaster.load(adapter=tmp_path / "adapter")


def test_one_short_series_keeps_the_zero_shot_forecast():
    series, forecaster = [np.random.default_rng(0).normal(size=(20, 1))], Forecaster.load("numbers")
    zero_shot = forecaster.forecast(series, 4, [0.1])
    metrics = training.finetune(forecaster, series, 4, steps=3, batch=2, rank=2)
    assert metrics["shares"].startswith("as before the training, which brought no certain gain")
    assert metrics["errors"]["after"] == metrics["errors"]["before"]
    np.testing.assert_allclose(forecaster.forecast(series, 4, [0.1]).quantiles, zero_shot.quantiles, rtol=1e-14)


def test_a_decoder_that_training_has_not_changed_is_no_part_of_a_forecast():
    """It is that of the zero-shot forecast, whose intervals are wider, and which is the mean of three."""
    draw = np.random.default_rng(1)
    series = [draw.normal(size=(24, 1)) for _ in range(40)]
    metrics = training.finetune(Forecaster.load("numbers"), series, 4, steps=1, batch=2, rank=2, learning_rate=9.0)
    assert metrics["best_step"] == 0
    assert metrics["shares"]
    assert "fine-tuned" not in metrics["shares"]


def test_shares_of_two_variables_forecast_a_single_one():
    forecaster, series = Forecaster.load("numbers"), [one[:, [0]] for one in patterns(2)]
    found = []
    for shares in ({"VAR": 1.0}, {"AR": 1.0}):
        forecaster.trained = Trained("numbers", "", reading=Reading(16, 4, 4, near=shares, far=shares))
        found.append(forecaster.forecast(series, 4, [0.1, 0.9]).quantiles)
    np.testing.assert_array_equal(*found)
    assert np.ptp(found[0]) > 0


def test_settings_that_no_fine_tuning_has_are_refused():
    no_text = [
        ({name: 3}, f"{name} is no option of a model that writes") for name in ("reads", "stride", "whole_windows")
    ]
    no_text += [({"learning_rate": None}, "learning_rate is None, expected a value; leave it out")]
    wrong = [({"samples": 3}, "is no option of a model that reads values"), ({"rank": 0}, "rank is 0, expected")]
    wrong += [({name: 0}, "expected a whole number") for name in ("steps", "season", "horizon")]
    wrong += [({"budget": flops}, "expected a finite number of FLOPs above 0") for flops in (np.nan, -1.0)]
    for model, cases in (("numbers", wrong), ("tiny", no_text)):
        for options, words in cases:
            with pytest.raises(TrainingError, match=words):
                Finetuning(Forecaster.load(model), patterns(6), **{"horizon": 4} | options)


def test_short_series_are_trained_on_with_a_shorter_horizon():
    parts = split([one[:27] for one in patterns(1)], 9)
    assert len(parts.train[0]) == 9
    many = Finetuning(Forecaster.load("numbers"), [*patterns(6), patterns(1)[0][:5]], 9, steps=1)
    assert "; 1 series are too short to train on; " in many.told
    job = Finetuning(Forecaster.load("numbers"), [patterns(1)[0][:27]], 9, steps=1)
    assert (job.tuning.reading.ahead, job.tuning.reading.context) == (4, 5)
    assert "AR" in job.run()["errors"]
