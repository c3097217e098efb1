"""The command `run` from end to end, on a plan that takes seconds."""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import REAL, undone
from experiments import run
from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import NUMBERS, checkpoint_hash
from experiments.forecasting.encoding import Encoding
from experiments.report.build import write_report
from experiments.report.words import flops
from experiments.storage.files import read_json as read
from experiments.storage.interruption import Interrupted, Interruption
from experiments.storage.runfolder import only_writer
from experiments.study import data, plans, suite
from experiments.study.evaluation import Judge
from flops import Ledger
from qwen_min.weights import TINY
from test_results import assert_metrics_of_forecasts, read_lines
from tests import forks, small_plan
from tests.faults import contents

pytestmark = pytest.mark.slow


@pytest.fixture
def words(monkeypatch, small_data) -> tuple:
    """The command of the complete run, but for its folder; runs are small here too."""
    small_plan.install(put=monkeypatch.setattr)
    return "run", "--data", small_data, "--samples", 9, "--out"


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / finished.name)


NAMES = ["untrained", "trial", "grid-r2-lr0.001", "grid-r2-lr0.01", "context-32", "context-96", "final"]  # and numbers


def test_one_command_gives_a_finished_report(finished):
    assert finished.with_name("log").read_text().strip().endswith(f"report: {finished / 'report.html'}")
    spent = Ledger(finished / "ledger.jsonl", budget=10**17).by_experiment()
    for name in (*NAMES, "numbers"):
        metrics = read(finished / "experiments" / name / "metrics.json")
        assert set(metrics) == ({"val", "test"} if name in ("untrained", "final", "numbers") else {"val"})
        assert metrics["val"]["all"]["sequences"] == 3
        assert ("mean_of_samples" in metrics.get("test", ())) == (name == "final")
        assert spent.get(name) == read(finished / "experiments" / name / "settings.json")["flops"].get("study")
    assert not [*finished.rglob("*.partial"), *finished.rglob("*state.*")]


def test_the_report_is_drawn_from_files_alone(copied, monkeypatch, command):
    """The figures were not drawn in the run."""
    before = (copied / "report.md").read_bytes()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert command("report", copied)[0] == 0
    assert (copied / "report.md").read_bytes() == before
    figures = list((copied / "figures").glob("*.png"))
    assert all(path.stat().st_size > 5000 for path in figures)
    assert (copied / "report.html").read_text().count("data:image/png;base64,") == len(figures) == 8 + 5


def test_the_best_settings_by_validation_are_taken_over(finished):
    folder = finished / "experiments"
    trainings = {name: read(folder / name / "settings.json")["training"] for name in NAMES}
    errors = {name: read(folder / name / "metrics.json")["val"]["all"]["mse"] for name in NAMES}
    grid, all_candidates = (trainings[min(names, key=errors.get)] for names in (NAMES[2:4], NAMES[2:6]))
    for name, best in (("context-32", grid), ("context-96", grid), ("final", all_candidates)):
        assert [trainings[name][key] for key in ("rank", "learning_rate")] == [best["rank"], best["learning_rate"]]
    assert trainings["final"]["context"] == all_candidates["context"]


def test_forecasts_and_samples_hold_what_the_metrics_say(finished):
    for name in (*NAMES, "numbers"):
        assert_metrics_of_forecasts(finished / "experiments" / name, horizon=3)
    for name in ("test.jsonl", "experiments/final/forecasts.test.jsonl", "experiments/final/samples.test.jsonl"):
        assert [line["id"] for line in read_lines(finished / name)] == data.split(20).test.tolist()


def test_the_seed_of_a_run_reaches_its_samples_and_the_gru(command, words, small_data, finished, tmp_path):
    assert command(*words, tmp_path, "--plan", "untrained", "--seed", 1)[0] == 0
    assert Ledger(tmp_path / "ledger.jsonl", budget=1).spent == 0
    assert "Grid of rank" not in (tmp_path / "report.md").read_text()
    network, other = (read(out / "baselines.json")["GRU trained on the 14"] for out in (tmp_path, finished))
    assert network["val"]["all"] != other["val"]["all"]
    trajectories, parts = data.read(small_data), data.split(20)
    scale = Encoding.fit(trajectories[parts.train]).scale
    drawn = Forecaster.load("tiny", scale=scale).forecast(trajectories[parts.test, :20], 3, samples=9, seed=1).samples
    lines = read_lines(tmp_path / "experiments" / "untrained" / "samples.test.jsonl")
    np.testing.assert_allclose(drawn / scale, [line["samples"] for line in lines])  # those of a forecaster


def terminate_final() -> None:
    """Ask this process to stop in the fourth step of the last training of text."""
    debit = Ledger.debit

    def debit_and_terminate(self, experiment, step, flops):
        debit(self, experiment, step, flops)
        if (experiment, step) == ("final", 3):
            os.kill(os.getpid(), signal.SIGTERM)

    Ledger.debit = debit_and_terminate


def test_a_run_that_is_asked_to_stop_saves_its_step_and_ends_with_the_same_bytes(words, copied, finished):
    """Here before the last two experiments are done; `faults.py` stops runs anywhere."""
    undone(copied, "final", "numbers")
    log, words = copied.with_name("log"), (*words[1:], copied)
    assert forks.run(log, partial(small_plan.main, before=terminate_final), *words) == 128 + signal.SIGTERM
    last = log.read_text().splitlines()[-1]
    assert last.startswith("stopped by SIGTERM; to continue from what is saved: python -m experiments.run --data")
    assert load_file(copied / "experiments" / "final" / "state.safetensors")["done"] == 4
    status = read(copied / "status.json")
    assert status["stopped"] == "Stopped by SIGTERM."
    page = write_report(copied).with_suffix(".md").read_text()
    assert "Not finished: final, numbers." in page
    assert f"Spent {flops(status['spent'])} of a budget of 1e17 FLOPs" in page
    assert forks.run(log, small_plan.main, *words) == 0, log.read_text()
    results = ("experiments/*/metrics.json", "experiments/*/adapter/*", "experiments/*/*.csv", "**/*.jsonl")
    assert contents(copied, *results) == contents(finished, *results)


def test_a_second_signal_does_not_wait_for_the_end_of_a_step(default_sigint):
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with Interruption() as interruption, interruption.held():
            signal.raise_signal(signal.SIGINT)  # the first one waits
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second signal has to stop at once")

    with pytest.raises(Interrupted, match="SIGINT"):
        work()
    assert signal.getsignal(signal.SIGINT) is before


def test_too_little_memory_ends_in_one_message(command, words, monkeypatch, tmp_path):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(suite.Suite, "_run", Mock(side_effect=error))
    status, _, err = command(*words, tmp_path / "out")
    assert (status, "stopped: DefaultCPUAllocator" in err) == (1, True)


def test_a_folder_that_another_process_writes_to_is_refused(command, refused, words, tmp_path):
    words = *words, tmp_path, "--plan", "untrained", "--sequences", 1, "--samples", 0
    with only_writer(tmp_path):  # by a descriptor of its own, as that of another process
        assert "another process is writing to it" in refused(*words)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert command(*words)[0] == 0


def test_a_finished_run_is_not_run_again_and_has_the_same_page_with_a_shortened_ledger_or_a_lost_one(
    copied, command, refused, words, monkeypatch
):
    page, booked = ((copied / name).read_bytes() for name in ("report.md", "ledger.jsonl"))
    assert "ledger.jsonl: not a readable" in refused("report", copied.parent, "--shorten")
    assert command("report", copied, "--shorten")[0] == 0
    lines = read_lines(copied / "ledger.jsonl")
    assert [line["steps"] for line in lines] == [2, 2, 2, 2, 2, 6, 3]
    files = contents(copied, "**/*.json", "**/*.jsonl", "**/*.safetensors")
    monkeypatch.delattr(suite, "train")
    status, out, _ = command(*words, copied)
    assert (status, out.splitlines()[0]) == (0, f"continuing {copied}")
    assert (copied / "report.md").read_bytes() == page
    assert contents(copied, "**/*.json", "**/*.jsonl", "**/*.safetensors") == files
    (copied / "ledger.jsonl").unlink()  # a run without trainings has none
    assert command("report", copied, "--shorten")[0] == 0
    assert command(*words, copied)[0] == 0
    assert (copied / "ledger.jsonl").read_bytes() == booked


def test_a_budget_that_does_not_suffice_ends_with_a_report_and_a_larger_one_continues(command, refused, words, copied):
    spent = read(undone(copied, "numbers") / "status.json")["spent"]
    status, _, err = command(*words, copied, "--budget", spent - 1)
    assert status == 1
    assert "Does not fit: final, numbers. Raise --budget" in err
    assert "stopped: numbers needs" in err
    assert "Not finished: numbers." in (copied / "report.md").read_text()
    before = read(copied / "status.json")
    assert before["stopped"].startswith("numbers needs")
    assert "FLOPs already; expected a --budget of that or more" in refused(*words, copied, "--budget", "1e6")
    status, _, err = command(*words, copied)
    assert (status, "Raise --budget" in err) == (0, False)
    assert "Not finished" not in (copied / "report.md").read_text()
    assert read(copied / "status.json")["stopped"] is None
    assert before["spent"] == spent - read(copied / "experiments/numbers/settings.json")["flops"]["study"]


def test_a_folder_of_another_run_is_refused_and_left_alone(refused, words, finished, tmp_path):
    before = contents(finished, "**/*")
    for other in (("--seed", 1), ("--dtype", "bfloat16"), ("--sequences", 2), ("--convention", "exact")):
        assert "choose another --out" in refused(*words, finished, *other)
    (tmp_path / "mine.txt").write_text("mine")
    assert "exists but has no run" in refused(*words, tmp_path)
    assert contents(finished, "**/*") == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("options", "message"), [
    ("--device abacus", "device 'abacus' cannot be used"),
    ("--model /no/such/folder", "no such folder"),
    ("--model model", "has 800 positions, plan quick needs 1321"),
    ("--model numbers", "numbers: plan quick is for a model that writes text"),
    ("--model tiny --plan numbers", "tiny: plan numbers is for a model that reads values"),
    ("--samples 8", "8 samples do not reach the quantile 0.1, expected 9 or more"),
    ("--data short", "70 time steps, expected at least 70 context"),
    ("--data wild", "expected less than 100"),
])  # fmt: skip
def test_bad_input_ends_in_one_message_and_writes_nothing(monkeypatch, tmp_path, refused, small_data, options, message):
    monkeypatch.chdir(tmp_path)
    series = data.read(small_data)
    data.write(Path("short"), series[:, :70])
    series[data.split(20).test[0], 75, 0] = 1e4
    data.write(Path("wild"), series)
    config = Path(shutil.copytree(TINY, "model"), "config.json")
    config.write_text(json.dumps(read(config) | {"max_position_embeddings": 800}))
    assert message in refused("run", "--data", small_data, "--out", "out", *options.split())
    assert {path.name for path in Path().iterdir()} == {"short", "wild", "model"}


def test_the_plan_numbers_trains_the_checkpoint_that_is_named(small_data, tmp_path):
    folder = shutil.copytree(NUMBERS, tmp_path / "mine")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"norm.weight": weights["norm.weight"] * 2}, folder / "model.safetensors")
    args = run.parser().parse_args(["--plan", "numbers", "--data", str(small_data), "--model", str(folder)])
    plan, judge, identity, _ = run.check_inputs(args, "cpu")
    assert identity["checkpoint_sha256"] == checkpoint_hash(folder)
    tuning = suite.number_tuning(judge, plan.experiments[0].training)
    torch.testing.assert_close(tuning.forecaster.model.norm.weight.data, weights["norm.weight"] * 2)


def test_what_does_not_fit_the_budget_is_named_before_a_run(tmp_path):
    judge = Judge(SimpleNamespace(config=REAL), None, None, {}, {}, "", 0, 0)

    def warning(convention):
        ledger = Ledger(tmp_path / "ledger.jsonl", 10**17)
        return suite.Suite(plans.study(seed=0), tmp_path, judge, ledger, convention, ("", ""), None).budget_warning()

    assert "Does not fit: final." in warning("study")
    assert warning("published") is None
