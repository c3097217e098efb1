"""Fine-tuning on a user's series: the budget, the best state, kills, the command and its page."""

import os
import re
import signal
from unittest.mock import Mock

import numpy as np
import pytest

from experiments import training
from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import Trained
from experiments.forecasting.contexts import SeriesWarning
from experiments.storage.files import RunError
from experiments.storage.interruption import Interrupted, Interruption
from experiments.tables import read_series
from experiments.training import loop
from experiments.training.finetuning import Finetuning
from experiments.training.settings import TrainingError
from experiments.training.text_tuning import TextTuning
from tests.faults import contents
from tests.test_backtest import waves

pytestmark = pytest.mark.slow


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


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize(("model", "options"), (FEW | {"tiny": {"context": 12, "samples": 2}}).items())
def test_a_killed_fine_tuning_ends_with_the_same_bytes(tmp_path, monkeypatch, model, options):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)

    def run(folder, sync):
        """Run in a folder; sync stands for `os.fsync`, which ends each write."""
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            training.finetune(Forecaster.load(model), waves(6, 40), 2, folder=folder, steps=3, **options)

    run(tmp_path / "whole", whole := Mock())
    wanted = contents(tmp_path / "whole", "**/*.*")
    assert {"metrics.json", "forecasts.jsonl", "adapter/adapter_model.safetensors", "ledger.jsonl"} <= wanted.keys()
    assert not [name for name in wanted if "state" in name]
    for writes in range(3, whole.call_count, 7):
        folder = tmp_path / str(writes)
        with pytest.raises(Killed):
            run(folder, Mock(side_effect=[None] * writes + [Killed]))
        run(folder, Mock())
        assert contents(folder, "**/*.*") == wanted


@pytest.mark.parametrize("model", ["tiny", "numbers"])
def test_an_interrupted_fine_tuning_leaves_the_forecaster_as_it_was(model, tmp_path):
    forecaster, options = Forecaster.load(model), FEW[model] | {"steps": 2}
    before = forecaster.forecast([waves(1)[0][:20]], 5).values
    asked = Interruption()
    asked.asked = signal.SIGINT
    with pytest.raises(Interrupted):
        Finetuning(forecaster, waves(6), 5, **options).run(tmp_path / "a", interruption=asked)
    np.testing.assert_array_equal(forecaster.forecast([waves(1)[0][:20]], 5).values, before)
    again = training.finetune(forecaster, waves(6), 5, folder=tmp_path / "a", **options)
    assert again == training.finetune(Forecaster.load(model), waves(6), 5, **options)


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
    np.savetxt(path, values, "%.4f", ",", header=",".join("abcdefgh"), comments="")
    job = Finetuning(Forecaster.load(), read_series(path, wide=True), 5, 1e11)
    assert "of 8 series of the same times" in job.told
    job.tuning.forecaster.trained = Trained("", "", reading=job.tuning.reading)
    newest = job.parts.test[-1]
    job.parts = job.parts._replace(test=[newest._replace(context=1e6 * newest.context)])
    with pytest.warns(SeriesWarning, match="^series h is negative, or on another scale"):
        job._forecasts(tmp_path / "state.json")


def test_bad_settings_give_one_clear_line_and_write_nothing(refused, tmp_path):
    path = csv(tmp_path / "one.csv", waves(1)[0])
    for option, value, message in (
        ("--targets", "q", "no Linear is called q"),
        ("--horizon", 40, "time steps, expected at least"),
        ("--context", 4, "context is 4, expected a whole number (int) of at least 8"),
    ):
        assert message in refused("finetune", path, "--model", "tiny", option, value)
    path.write_text(path.read_text().replace("\n", "\n,\n", 2))
    assert "missing" in refused("finetune", path, "--missing", "error")
    assert [one.name for one in tmp_path.iterdir()] == ["one.csv"]


def test_held_out_forecasts_of_text_read_what_the_training_reads():
    series = [np.sin(np.arange(420) / (3 + at))[:, None] for at in range(2)]
    tuning = TextTuning(Forecaster.load("tiny"), series, 130, samples=0)
    assert tuning.context == (2048 - 8 * 130) // 5  # not twice the horizon, as those that have room
    assert tuning.settings.context == 5 * (tuning.context + 130)
    with pytest.raises(TrainingError, match="a forecast of 130 time steps after 202 does not fit: the model has 2048"):
        TextTuning(Forecaster.load("tiny"), series, 130, context=202)


def test_a_second_fine_tuning_knows_the_rows_of_the_first_one():
    """As after an export, whose record says which rows trained the adapter that is in the weights."""
    forecaster = Forecaster.load("tiny")
    forecaster.trained = Trained("tiny", "", ends={"of the first": 2})
    assert Finetuning(forecaster, waves(3, 60), 3, steps=1).trained.ends["of the first"] == 2


def test_missing_values_do_not_count_in_the_loss():
    forecaster, context = Forecaster.load("tiny"), 5 + np.sin(np.arange(20) / 4)
    whole = np.array([[5.1], [5.2], [5.3]])
    first, last = (forecaster.nats_per_value([context], [part])[0] for part in (whole[:1], whole))
    gap = np.array([[5.1], [np.nan], [np.nan]])
    assert forecaster.nats_per_value([context], [gap])[0] == pytest.approx(first, rel=1e-4)
    assert first != pytest.approx(last, rel=1e-3)
