"""Fine-tuning on a user's series: the split, the budget, the best state, kills, the command and its page."""

import json
import re
import signal
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from experiments import training
from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import Trained, ends_of, rows_seen
from experiments.forecasting.backtest import Origin, baseline_forecasts, filled, held_out, scores, split
from experiments.forecasting.contexts import SeriesError, SeriesWarning
from experiments.forecasting.scores import mean_interval
from experiments.storage.files import RunError
from experiments.storage.interruption import Interrupted, Interruption
from experiments.tables import common_times, read_series
from experiments.training import loop
from experiments.training.finetuning import Finetuning
from experiments.training.text_tuning import TextTuning
from experiments.training.windows import TrainingError
from tests.faults import contents

pytestmark = pytest.mark.slow


def waves(count: int, steps: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        np.stack([-2 + np.sin(np.arange(steps) / rate + rng.random()), 9 * np.cos(np.arange(steps) / rate)], 1)
        for rate in rng.uniform(1, 4, count)
    ]


def test_whole_series_are_held_out_if_there_are_many_and_the_end_if_there_are_few():
    series = waves(20)
    parts = split(series, 5)
    assert (len(parts.train), len(parts.val), len(parts.test)) == (14, 15, 15)
    trained = {one.tobytes() for one in parts.train}
    for place in parts.val + parts.test:
        (source,) = [one for one in series if np.array_equal(one[: len(place.context)], place.context)]
        assert source.tobytes() not in trained
        assert np.array_equal(source[len(place.context) :][:5], place.truth)
    (series,) = waves(1, 100)
    parts = split([series], 10)
    assert np.array_equal(parts.train[0], series[:60])
    assert [len(place.context) for place in parts.val + parts.test] == [60, 70, 80, 90]
    assert np.array_equal(parts.test[-1].truth, series[90:])
    with pytest.raises(SeriesError, match="a series has 17 time steps, expected at least 18"):
        split([series[:17]], 5)


def test_errors_of_values_of_any_size_are_the_same_and_a_constant_is_no_unit():
    """0.1 repeated has a standard deviation of 3e-17 by rounding."""
    series = [*waves(5), np.stack([np.repeat([0.1, 0.2], [56, 4])] * 2, axis=1)]
    errors = []
    for size in (1, 1e-200, 1e200):
        places = held_out([size * one for one in series], 4, 1)
        errors.append(scores(np.stack([np.repeat(one.context[-1:], 4, axis=0) for one in places]), places)["rmse"])
    assert errors == pytest.approx([errors[0]] * 3)
    assert 0.1 < errors[0] < 10


def test_errors_are_in_standard_deviations_and_units_and_baselines_read_the_whole_past():
    places = held_out(waves(3), 4, 2)
    truth = np.stack([place.truth for place in places])
    spread = np.stack([place.context.std(axis=0) for place in places])[:, None]
    error = scores(truth + 2 * spread, places)
    assert error["rmse"] == pytest.approx(2)
    np.testing.assert_allclose(error["mae"], 2 * spread.mean(axis=(0, 1)))
    found = baseline_forecasts([place.context for place in places], 4)
    assert scores(found["AR"], places)["rmse"] < 0.2 < scores(found["persistence"], places)["rmse"]
    rows = 2 * np.pi * np.arange(300.0) / 48  # a model's context of 20 steps would show no season
    places = split([np.stack([10 + np.sin(rows), 10 + np.cos(rows)], axis=1)], 10).test
    found = baseline_forecasts([place.context for place in places], 10, names=["seasonal naive"])
    assert scores(found["seasonal naive"], places)["rmse"] < 0.1


def test_an_interval_is_over_series_over_dates_or_over_the_forecasts_of_few_series():
    """Forecasts of a series fail together, and what moves all series at a date counts once."""
    unit = np.array([[-1.0], [1.0]])
    places = [Origin(unit, np.zeros((1, 1)), number, number) for number in range(8) for _ in range(5)]
    by_date = [place._replace(group=at % 5) for at, place in enumerate(places)]
    errors = np.exp(np.random.default_rng(0).normal(size=(8, 5)))
    for some, means, over in (
        (places, (errors**2).mean(axis=1), "series"),
        (by_date, (errors**2).mean(axis=0), "dates"),
        (places[:20], errors[:4].ravel() ** 2, "forecasts"),
    ):
        found = scores(errors.reshape(-1, 1, 1)[: len(some)], some)
        assert found["over"] == over
        assert found["rmse"] == pytest.approx(np.sqrt(means.mean()))
        np.testing.assert_allclose(np.square(found["interval"]), np.maximum(mean_interval(means), 0))


FEW = {"tiny": {"context": 15, "samples": 0}, "numbers": {"context": 16, "batch": 2, "rank": 2}}


@pytest.mark.parametrize(("model", "tokens"), [("tiny", 200), ("numbers", 2)])
def test_a_budget_decides_the_steps_and_is_never_exceeded(tmp_path, model, tokens):
    forecaster, options = Forecaster.load(model), FEW[model]
    cost = Finetuning(forecaster, waves(6), 5, steps=1, **options).tuning.cost
    job = Finetuning(forecaster, waves(6), 5, 2.9 * cost, **options)
    assert (job.tuning.settings.steps, job.tuning.settings.context) == (2, tokens)
    for budget, steps, told in ((0.9 * cost, None, "a step of .* does not fit"), (2.9 * cost, 3, "fewer steps")):
        with pytest.raises(TrainingError, match=told):
            Finetuning(forecaster, waves(6), 5, budget, steps=steps, **options)
    metrics = job.run(tmp_path)
    assert metrics["spent"] == 2 * cost <= metrics["budget"] == int(2.9 * cost)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["flops"] for line in lines] == [cost] * 2
    with pytest.raises(TrainingError, match="the model has an adapter; load the forecaster anew"):
        training.finetune(forecaster, waves(6), 5, **options)


def test_fitting_helps_and_keeps_the_best_state(tmp_path):
    forecaster = Forecaster.load("tiny")
    pattern = np.random.default_rng(0).uniform(1, 9, (7, 2))
    series = [np.tile(pattern, (9, 1))[number : number + 50] * (1 + number) for number in range(8)]
    options = {"steps": 12, "context": 12, "rank": 4, "learning_rate": 5e-3, "samples": 0}
    metrics = training.finetune(forecaster, series, 3, folder=tmp_path, **options)
    assert metrics["held_out_after"] < 0.6 * metrics["held_out_before"]
    contexts = [one[:30] for one in series]
    loaded = Forecaster.load(adapter=tmp_path / "adapter")
    np.testing.assert_array_equal(loaded.forecast(contexts, 5).values, forecaster.forecast(contexts, 5).values)
    assert loaded.tokens == forecaster.tokens == 15 * 2 * 5  # of 12 time steps and 3 to forecast
    rows = [line.split(",") for line in (tmp_path / "held_out.csv").read_text().splitlines()[1:]]
    assert min(rows, key=lambda row: float(row[1]))[0] == str(metrics["best_step"])


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize(("model", "options"), (FEW | {"tiny": {"context": 12, "samples": 2}}).items())
def test_a_killed_fine_tuning_ends_with_the_same_bytes(tmp_path, monkeypatch, model, options):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)

    def run(folder, kill_at=None):
        """Run in a folder and kill the process, in effect, before its write number kill_at."""
        written = []

        def counted(path, content, write=loop.write_whole):
            if len(written) == kill_at:
                raise Killed
            written.append(path.name)
            write(path, content)

        with monkeypatch.context() as patch:
            for module in ("training.loop", "training.run", "training.finetuning", "storage.runfolder"):
                patch.setattr(f"experiments.{module}.write_whole", counted)
            training.finetune(Forecaster.load(model), waves(6, 40), 2, folder=folder, steps=3, **options)
        return written

    writes = run(tmp_path / "whole")
    wanted = contents(tmp_path / "whole", "**/*.*")
    assert {"metrics.json", "forecasts.jsonl", "adapter/adapter_model.safetensors", "ledger.jsonl"} <= wanted.keys()
    assert not [name for name in wanted if "state" in name]
    for kill_at in range(1, len(writes), 3):
        folder = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            run(folder, kill_at)
        run(folder)
        assert contents(folder, "**/*.*") == wanted


@pytest.mark.parametrize("model", ["tiny", "numbers"])
def test_an_interrupted_fine_tuning_leaves_the_forecaster_as_it_was(model, tmp_path):
    forecaster, options = Forecaster.load(model), FEW[model] | {"steps": 2}
    before = forecaster.forecast([waves(1)[0][:20]], 5).values
    asked = Interruption()
    asked.asked = signal.SIGINT
    with pytest.raises(Interrupted):
        Finetuning(forecaster, waves(6), 5, **options).run(tmp_path / "a", interruption=asked)
    assert forecaster.trained is None
    np.testing.assert_array_equal(forecaster.forecast([waves(1)[0][:20]], 5).values, before)
    again = training.finetune(forecaster, waves(6), 5, folder=tmp_path / "a", **options)
    assert again == training.finetune(Forecaster.load(model), waves(6), 5, folder=tmp_path / "b", **options)


def test_a_folder_belongs_to_one_fine_tuning(tmp_path):
    """From Python as from the command: other series, also with the same numbers, or other settings are refused."""
    options = {"folder": tmp_path, "context": 15, "steps": 2, "samples": 0}
    first = training.finetune(Forecaster.load("tiny"), waves(6), 5, **options)
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    forecaster = Forecaster.load("tiny")
    assert training.finetune(forecaster, waves(6), 5, **options) == first
    assert (tmp_path / "ledger.jsonl").read_bytes() == ledger
    assert forecaster.trained == Forecaster.load(adapter=tmp_path / "adapter").trained
    path = tmp_path / "plan.json"
    path.write_text(re.sub('"torch": "[^"]*"', '"torch": "1.0"', path.read_text()))
    with pytest.warns(UserWarning, match=r'was begun with other versions: torch "1.0", now'):
        training.finetune(Forecaster.load("tiny"), waves(6), 5, **options)
    joined = [np.concatenate(waves(6)[:2]), *waves(6)[2:]]
    for series, seed, name in ((waves(7)[1:], 0, "series"), (joined, 0, "series"), (waves(6), 1, "settings")):
        with pytest.raises(RunError, match=f"has a run with {name}"):
            training.finetune(Forecaster.load("tiny"), series, 5, seed=seed, **options)


def csv(path, series):
    np.savetxt(path, series, "%.4f", ",", header="u,v", comments="")
    return path


def test_the_command_ends_with_the_result_and_its_adapter_forecasts(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    series = waves(6)
    series[0][5] = np.nan
    files = [csv(tmp_path / f"s{i}.csv", one) for i, one in enumerate(series)]
    few = ("--model", "tiny", "--horizon", 5, "--context", 15, "--samples", 9, "--out", "mine")
    words = ("finetune", *files, *few, "--missing", "interpolate", "--budget")
    status, out, _ = command(*words, "5e9")
    assert status == 0
    lines = out.splitlines()
    assert "2 variables (u, v), and 5 more series; 2 of 720 values are missing" in lines[0]
    assert lines[-1].startswith("VAR is better here: it has ")
    assert "of 5.000e+09 FLOPs spent in" in lines[-3]
    assert lines[-2] == "adapter: mine/adapter; results: mine/report.html"
    page = tmp_path / "mine" / "report.md"
    before = page.read_bytes()
    assert command(*words, "5e9")[1].splitlines()[3:] == ["continuing mine", *lines[3:]]
    page.unlink()
    assert command("report", "mine")[0] == 0
    assert page.read_bytes() == before
    forecaster = Forecaster.load(adapter=tmp_path / "mine" / "adapter")
    assert forecaster.encoding.scale is None  # it is fitted to each context
    assert forecaster.forecast([waves(1)[0][:20]], 5).values.shape == (1, 5, 2)


def test_series_of_a_file_are_what_they_are_for_the_command(tmp_path):
    """Columns of one table are series of the same times, and a warning names a series, not the number of a forecast."""
    path, values = tmp_path / "wide.csv", np.concatenate(waves(4, 40), axis=1)
    values[:, 5] *= 1e6
    np.savetxt(path, values, "%.4f", ",", header=",".join("abcdefgh"), comments="")
    series = read_series(path, wide=True)
    assert "of 8 series of the same times" in Finetuning(Forecaster.load(), series, 5, 1e11).told
    job = Finetuning(Forecaster.load(), series[:5] + series[6:], 5, 1e11)
    job.tuning.forecaster.trained = Trained("", "", reading=job.tuning.reading)
    test = [Origin(one.context * 1e6, one.truth, one.series, one.group) for one in job.parts.test]
    job.parts = job.parts._replace(test=test[-1:])
    with pytest.warns(SeriesWarning, match="^series h is negative, or on another scale"):
        job._forecasts(tmp_path / "state.json")


def test_bad_settings_give_one_clear_line_and_write_nothing(refused, tmp_path):
    path = csv(tmp_path / "one.csv", waves(1)[0])
    for option, value, message in (
        ("--targets", "q", "no Linear is called q"),
        ("--horizon", 40, "time steps, expected at least"),
        ("--context", 500, "the model has 2048 positions; shorten one of them"),
        ("--context", 4, "context is 4, expected at least 8 time steps"),
        ("--rate", 0, "learning_rate is 0.0, expected a positive number"),
    ):
        assert message in refused("finetune", path, "--model", "tiny", option, value)
    assert [one.name for one in tmp_path.iterdir()] == ["one.csv"]


def in_order(parts) -> None:
    """Check that what is held out is later, where values grow with time."""
    assert max(one.max() for one in parts.train) < min(place.truth.min() for place in parts.val)
    assert max(one.max() for one in parts.seen) < min(place.truth.min() for place in parts.test)


def test_series_of_the_same_dates_are_judged_by_later_dates_than_they_are_trained_on():
    """Else a training learns what moved all of them on the days of the test: an error of 0.33 was one of 0.88."""
    dates = pd.date_range("2023-01-01", periods=100)
    spans = [(0, 100)] * 8 + [(0, 99), (0, 60), (80, 100), (5, 100)]  # a day late, closed, new, begun later
    frames = [pd.DataFrame({"x": np.arange(a, b, dtype=float)}, dates[a:b].rename("date")) for a, b in spans]
    parts = split([one.to_numpy() for one in frames], 10, common_times(frames))
    assert parts.told == (
        "the first 55 to 60 time steps to train on, 20 for validation, the newest 20 for the test, of 11 series of the "
        "same times; the test is of 10"
    )
    assert [len(one) for one in parts.train] == [60] * 10 + [55]
    in_order(parts)
    assert {place.group for place in parts.test} == {-2, -1}
    mixed = [one[::7] if number % 2 else one for number, one in enumerate(frames[:8])]  # of days and of weeks
    in_order(split([one.to_numpy() for one in mixed], 2, common_times(mixed)))
    ages = [200] * 3 + [20] * 3  # half of the shops are new
    parts = split([np.arange(n, dtype=float)[:, None] for n in ages], 7, [np.arange(200 - n, 200) for n in ages])
    assert "to train on, 21 for validation, the newest 21 for the test, of 3 series of the same times" in parts.told
    some_apart = frames[:6] + [one.set_axis(one.index + pd.Timedelta(days=900)) for one in frames[6:8]]
    assert common_times(some_apart) is not None
    late = [one.to_numpy() for one in frames[:8]]
    late[3] = np.where(np.arange(100)[:, None] < 70, np.nan, late[3])  # a new shop, in a table with a column for each
    assert "of 7 series of the same times" in split(late, 10, [np.arange(100)] * 8).told
    # the days of an experiment are no dates, and patients of several years are not those of one time
    days = [one.set_axis(pd.RangeIndex(len(one)).astype(float).rename("day")) for one in frames]
    apart = [one.set_axis(one.index + pd.Timedelta(days=200 * at)) for at, one in enumerate(frames)]
    assert common_times(days) is common_times(apart) is None
    seconds = [one.set_axis((one.index - dates[0]).total_seconds().rename("at") + 1.6e9) for one in frames]
    assert [*map(list, common_times(seconds))] == [*map(list, common_times(frames))]
    told = [Finetuning(Forecaster.load(), some, 10, 1e11).told for some in (frames, days)]
    assert ["same times" in one for one in told] == [True, False]


def test_short_series_are_not_held_out():
    """Else one of 12 rows among five of 60 would leave nothing to judge a horizon of 7 by."""
    for short in range(5):
        parts = split([np.arange(12.0 if number == short else 60.0)[:, None] for number in range(5)], 7)
        assert 12 in map(len, parts.train)
    parts = split([np.arange(60.0 if number < 4 else 12.0)[:, None] for number in range(20)], 7)
    assert sorted(map(len, parts.train))[-3:] == [12, 60, 60]
    assert len(parts.val[-1].context) == len(parts.test[-1].context) == 53


def test_a_copy_in_the_test_is_named():
    with pytest.warns(SeriesWarning, match="series 4 is in the test, and a copy of it is not"):
        split([*waves(5), *waves(5)], 5)


def test_held_out_places_know_nothing_of_what_follows_and_count_what_is_known():
    series = np.stack([np.arange(40.0), np.ones(40)], axis=1)
    series[20:33, 0] = np.nan
    places = held_out([series], 5, 4)
    for place, start in zip(places, (20, 25, 30, 35), strict=True):
        np.testing.assert_array_equal(place.context, series[:start])
        assert place.past[:20, 0].tolist() == list(range(20))
        np.testing.assert_allclose(place.past[20:33, 0], 19 if start < 33 else np.arange(20, 33))
        np.testing.assert_array_equal(place.truth, series[start : start + 5])
    wrong = scores(np.stack([np.where(np.isnan(p.truth), 1e9, p.truth + 1) for p in places]), places)
    assert wrong["mae"] == [1, 1]
    assert np.isfinite(wrong["rmse"])
    assert not np.isnan(np.concatenate(split([series], 3).train)).any()
    late = np.concatenate((np.arange(30.0), np.full(140, np.nan), np.arange(30.0)))[:, None]
    assert [len(place.context) for place in held_out([late], 5, 8)] == [175, 180, 185, 190, 195]
    series[:, 0] = np.nan
    with pytest.raises(SeriesError, match="series 0: variable 0 has no value in the 20 time steps before a"):
        held_out([series], 5, 4)
    with pytest.raises(SeriesError, match="series 0: variable 0 has no value in the 30 time steps before a"):
        split([series], 5, [np.arange(40)])


def test_a_back_test_leaves_out_the_rows_that_trained_an_adapter():
    series = waves(3, 80)
    ends = ends_of(series[0][:60]) | ends_of(series[1][:60])
    starts = [[len(place.context) for place in held_out(series, 5, 6, ends) if place.series == at] for at in range(3)]
    assert starts == [[60, 65, 70, 75]] * 2 + [[50, 55, 60, 65, 70, 75]]
    # a shop that has closed ends like others that have
    shops = [np.append(np.arange(20.0) + 10 * at, np.zeros(60))[:, None] for at in (0, 1)]
    assert {place.series for place in held_out(shops, 5, 2, ends_of(shops[0]))} == {1}
    # older rows are gone, or have been found, also of a series of few rows
    few = ends_of(series[0][:20])
    for rows in (series[0][2:26], np.append(series[1], series[0][:26], axis=0)):
        assert [len(rows) - len(place.context) for place in held_out([rows], 3, 9, few)] == [6, 3]
    assert [len(place.context) for place in held_out([series[0][10:]], 5, 6, ends)] == [50, 55, 60, 65]
    # newest rows are gone, or have been revised
    revised = np.append(series[0][:59], series[0][59:] + 0.01, axis=0)
    assert [len(place.context) for place in held_out([revised], 5, 6, ends)] == [60, 65, 70, 75]
    for gone in (series[0][:50], series[0][:60]):
        with pytest.raises(SeriesError, match="the adapter was trained on all rows that could be held out"):
            held_out([gone], 5, 5, ends)


def test_what_tells_the_rows_of_a_training_from_others():
    series = waves(2, 80)
    rows = np.array([[1.0], [-0.0], [np.nan]])
    assert ends_of(rows) == ends_of(np.array([[1.0], [0.0], [-np.nan]])) != ends_of(rows + 1)
    # an outage, and rare events, are no ends that tell series apart; one that is still out can be told
    out = np.append(series[0], np.full((40, 2), np.nan), axis=0)
    assert rows_seen(np.insert(series[1], 50, out[-40:], axis=0), ends_of(out)) == 0
    assert rows_seen(out, ends_of(out)) == rows_seen(np.append(out, series[1], axis=0), ends_of(out)) == 80
    draws = np.random.default_rng(0).random((30, 120, 1)) < 0.05
    assert not any(rows_seen(one, ends_of(other)) for one, other in pairwise(1.0 * draws))
    assert (
        rows_seen(
            np.append(series[0][:60], np.ones((18, 2)), axis=0),
            ends_of(np.append(series[0][:60], np.ones((50, 2)), axis=0)),
        )
        == 78
    )


def test_held_out_forecasts_of_text_read_what_the_training_reads():
    series = [np.sin(np.arange(420) / (3 + at))[:, None] for at in range(2)]
    tuning = TextTuning(Forecaster.load("tiny"), series, 130, samples=0, steps=1)
    assert tuning.context == (2048 - 8 * 130) // 5  # not twice the horizon, as those that have room
    assert tuning.settings.context == 5 * (tuning.context + 130)
    with pytest.raises(TrainingError, match="a forecast of 130 time steps after 202 does not fit: the model has 2048"):
        TextTuning(Forecaster.load("tiny"), series, 130, context=202)


def test_errors_over_dates_lie_in_their_interval_and_count_each_date_once():
    """Where few series, with large errors, have more dates than the others."""
    numbers = [*np.repeat(range(5), 5), *range(5, 45)]
    groups, error = [*np.tile(range(5), 5), *[4] * 40], np.repeat([9.0, 1.0], (25, 40))
    past, draw = np.random.default_rng(0).normal(size=(50, 1)), np.random.default_rng(1)
    places = [Origin(past, np.zeros((1, 1)), number, group) for number, group in zip(numbers, groups, strict=True)]
    found = scores((error * draw.uniform(0.9, 1.1, len(error)))[:, None, None], places)
    assert found["over"] == "dates"
    assert found["interval"][0] < found["rmse"] < found["interval"][1]


def test_regressions_fall_as_far_as_they_rise():
    rows = 300 - 2 * np.arange(50.0)[:, None] + np.random.default_rng(0).normal(size=(50, 1))
    falls, rises = (baseline_forecasts([one], 50, names=["AR"])["AR"] for one in (rows, 500 - rows))
    np.testing.assert_allclose(500 - rises, falls)
    assert falls.min() < 120


def test_what_cannot_read_gaps_reads_no_invented_rows_before_a_series_either():
    rows, gap = np.arange(60.0)[:, None], np.full((300, 1), np.nan)
    np.testing.assert_array_equal(filled(np.concatenate((gap, rows)), 0), rows)
    np.testing.assert_array_equal(filled(np.concatenate((rows, gap, rows)), 0), rows)


def test_missing_values_do_not_count_in_the_loss():
    forecaster, context = Forecaster.load("tiny"), 5 + np.sin(np.arange(20) / 4)
    whole = np.array([[5.1], [5.2], [5.3]])
    first, last = (forecaster.nats_per_value([context], [part])[0] for part in (whole[:1], whole))
    gap = np.array([[5.1], [np.nan], [np.nan]])
    assert forecaster.nats_per_value([context], [gap])[0] == pytest.approx(first, rel=1e-4)
    assert first != pytest.approx(last, rel=1e-3)
