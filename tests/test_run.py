"""The command line from end to end, on a plan that takes seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.torch import load_file

from experiments import run
from experiments.forecasting import Forecaster, gru, scores
from experiments.forecasting.encoding import Encoding
from experiments.report.build import write_report
from experiments.report.results import load_run
from experiments.storage.files import RunError
from experiments.storage.interruption import Interrupted, Interruption
from experiments.study import data, plans
from experiments.training.settings import Training
from flops import Ledger
from small_plan import quick

PATH = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[1])))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small.h5"
    data.write(path, data.simulate(seed=0, num_systems=20))
    return path


@pytest.fixture
def small_plan(monkeypatch):
    """Replace the quick plan by one with a few steps, in this process."""
    monkeypatch.setitem(plans.PLANS, "quick", quick)
    monkeypatch.setattr(gru, "STEPS", 3)


def start(*arguments, before=""):
    """Run the small plan in a new process."""
    code = f"import sys, small_plan\nsmall_plan.install()\n{before}\nfrom experiments import run\n"
    command = [sys.executable, "-c", code + "sys.exit(run.main(sys.argv[1:]))", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PATH})


def contents(folder: Path, *patterns) -> dict[str, bytes]:
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def finished(data_file, tmp_path_factory):
    """A complete run in its own process: (folder, process)."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, start("--data", data_file, "--out", out)


NAMES = ["untrained", "trial", "grid-r2-lr0.001", "grid-r2-lr0.01", "context-32", "context-96", "final"]


def test_one_command_gives_a_finished_report(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().endswith(f"report: {out / 'report.html'}")
    assert "Final, mean of 20 samples, has a mean squared error of " in process.stdout
    assert "experiment 1 of 7: untrained\n" in process.stderr
    assert "experiment 7 of 7: final, about 1 min left\n" in process.stderr
    for name in NAMES:
        metrics = json.loads((out / "experiments" / name / "metrics.json").read_text())
        assert set(metrics) == ({"val", "test"} if name in ("untrained", "final") else {"val"})
        assert metrics["val"]["all"]["sequences"] == 3
        assert ("mean_of_samples" in metrics["val"]) == (name == "final")
    for number in range(2, 13):
        assert (out / "figures" / f"figure-{number:02d}.png").stat().st_size > 5000
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for table in ("Table 2", "Tables 3 and 4", "Table 5", "Table 6"):
        assert f"{table}: " in markdown
        assert f"{table}: " in page
    for name in ("by-horizon", "first", "worst", "errors", "error-by-flops"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5000
    assert page.count("data:image/png;base64,") == 11 + 5
    assert "0.2702" in markdown  # published, next to ours
    assert markdown.count("| final, mean of 20 samples |") == 2  # in the results, and in the comparison with `final`
    assert "final, mean of 20 samples against the others, paired" in markdown
    assert "final against the others, paired" in markdown
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("state.safetensors"))


def test_the_ledger_holds_what_the_settings_promise(finished):
    out, _ = finished
    spent = Ledger(out / "ledger.jsonl", budget=10**17).by_experiment()
    for name in NAMES[1:]:
        assert spent[name] == json.loads((out / "experiments" / name / "settings.json").read_text())["flops"]["study"]


def test_the_best_settings_by_validation_are_taken_over(finished):
    out, _ = finished

    def mse_and_training(name):
        path = out / "experiments" / name
        mse = json.loads((path / "metrics.json").read_text())["val"]["all"]["mse"]
        return mse, json.loads((path / "settings.json").read_text())["training"]

    best_cell = min(NAMES[2:4], key=lambda name: mse_and_training(name)[0])
    for name in ("context-32", "context-96"):
        assert (mse_and_training(name)[1]["rank"], mse_and_training(name)[1]["learning_rate"]) == (
            2,
            mse_and_training(best_cell)[1]["learning_rate"],
        )
    best = min(NAMES[2:6], key=lambda name: mse_and_training(name)[0])
    assert {k: mse_and_training("final")[1][k] for k in ("rank", "learning_rate", "context")} == {
        k: mse_and_training(best)[1][k] for k in ("rank", "learning_rate", "context")
    }


def test_forecast_lines_hold_what_the_metrics_say(finished):
    out, _ = finished
    path = out / "experiments" / "final"
    lines = [json.loads(line) for line in (path / "forecasts.test.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == data.split(20).test.tolist()
    mse = json.loads((path / "metrics.json").read_text())["test"]["all"]["mse"]
    assert np.mean([line["mse"] for line in lines]) == pytest.approx(mse)
    for line in lines:
        errors = np.array(line["forecast"], dtype=float) - np.array(line["truth"])
        assert errors.shape == (30, 2)
        assert np.nanmean(errors[:10] ** 2) == pytest.approx(line["mse"], rel=1e-4)
        assert np.array(line["quantiles"]).shape == (5, 10, 2)


def test_samples_are_kept_and_their_scores_can_be_recomputed(finished):
    path = finished[0] / "experiments" / "final"
    metrics = json.loads((path / "metrics.json").read_text())
    for split in ("val", "test"):
        drawn, lines = (
            [json.loads(line) for line in (path / f"{kind}.{split}.jsonl").read_text().splitlines()]
            for kind in ("samples", "forecasts")
        )
        assert [one["id"] for one in drawn] == [line["id"] for line in lines]
        samples = np.array([one["samples"] for one in drawn])
        assert samples.shape == (3, 20, 10, 2)
        np.testing.assert_array_equal(samples, samples.round(2))
        truth = np.array([line["truth"] for line in lines])[:, :10]
        for name, value in scores.probabilistic(samples, truth).items():
            assert value == pytest.approx(metrics[split]["probabilistic"][name], rel=1e-4)
        assert ((samples.mean(axis=1) - truth) ** 2).mean() == pytest.approx(
            metrics[split]["mean_of_samples"]["all"]["mse"], rel=1e-4
        )


def test_the_seed_of_a_run_reaches_its_samples_and_the_gru(small_plan, data_file, tmp_path):
    found = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        arguments = ["--plan", "untrained", "--data", str(data_file), "--samples", "2", "--sequences", "1"]
        assert run.main([*arguments, "--seed", str(seed), "--out", str(out)]) == 0
        line = json.loads((out / "experiments" / "untrained" / "samples.val.jsonl").read_text())
        gru_errors = json.loads((out / "baselines.json").read_text())["GRU trained on the 14"]["val"]["mse_each"]
        found.append((line["id"], line["samples"], gru_errors))
    (row, samples, errors), (_, other_samples, other_errors) = found
    assert samples != other_samples
    assert errors != other_errors
    trajectories = data.read(data_file).trajectories
    scale = Encoding.fit(trajectories[data.split(20).train]).scale
    drawn = Forecaster.load("tiny", scale=scale).forecast(trajectories[[row], :70], 10, samples=2).samples[0]
    np.testing.assert_allclose(drawn / scale, samples)  # seed 0 of a run gives the samples of a forecaster with seed 0


def test_the_report_is_redrawn_from_files_alone(finished):
    out, _ = finished
    before = contents(out, "report.*", "figures/*")
    code = "import sys; from experiments.report.__main__ import main; main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, env=os.environ | {"PYTHONPATH": PATH})
    assert contents(out, "report.*", "figures/*") == before


def test_finished_experiments_are_not_run_again(finished, data_file):
    out, _ = finished
    before = contents(out, "**/*.json", "**/*.jsonl", "**/*.safetensors")
    process = start(
        "--data", data_file, "--out", out, before="from experiments.study import suite; del suite.run_training"
    )
    assert process.returncode == 0, process.stderr
    assert "continuing" in process.stdout
    assert contents(out, "**/*.json", "**/*.jsonl", "**/*.safetensors") == before


KEPT = ("experiments/*/metrics.json", "experiments/*/adapter/*", "experiments/*/*.csv", "experiments/*/*.jsonl",
        "ledger.jsonl")  # fmt: skip
KILL = """
import os, signal
from flops import Ledger
plain = Ledger.debit
def debit(self, experiment, step, flops):
    plain(self, experiment, step, flops)
    if (experiment, step) == ("final", 3):
        os.kill(os.getpid(), signal.SIGKILL)
Ledger.debit = debit
"""


def test_a_killed_run_ends_with_the_same_bytes(finished, data_file, tmp_path):
    out, _ = finished
    killed = tmp_path / "killed"
    process = start("--data", data_file, "--out", killed, before=KILL)
    assert process.returncode == -signal.SIGKILL
    assert (killed / "experiments" / "final" / "state.safetensors").exists()
    assert not (killed / "experiments" / "final" / "metrics.json").exists()
    for status in ("with", "without"):
        if status == "without":
            (killed / "status.json").unlink()
        page = write_report(killed).with_suffix(".md").read_text()
        assert "Not finished, and shown as -: final." in page
        spent = sum(json.loads(line)["flops"] for line in (killed / "ledger.jsonl").read_text().splitlines())
        of_budget = (
            " of a budget of 1.000e+17 FLOPs" if status == "with" else " FLOPs in the convention study; no status"
        )
        assert f"Spent {spent:.3e}{of_budget}" in page
    process = start("--data", data_file, "--out", killed)
    assert process.returncode == 0, process.stderr
    assert contents(killed, *KEPT) == contents(out, *KEPT)


TERMINATE = """
import os, signal, experiments.training.loop
experiments.training.loop.SAVE_SECONDS = 1000
from flops import Ledger
plain = Ledger.debit
def debit(self, experiment, step, flops):
    plain(self, experiment, step, flops)
    if (experiment, step) == ("final", 3):
        os.kill(os.getpid(), signal.SIGTERM)
Ledger.debit = debit
"""


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves_it(finished, data_file, tmp_path):
    out, _ = finished
    stopped = tmp_path / "stopped"
    process = start("--data", data_file, "--out", stopped, before=TERMINATE)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM; to continue from what is saved: python -m experiments.run --data")
    assert len(load_file(stopped / "experiments" / "final" / "state.safetensors")["losses"]) == 4
    assert json.loads((stopped / "status.json").read_text())["stopped"] == "Stopped by SIGTERM."
    process = start("--data", data_file, "--out", stopped)
    assert process.returncode == 0, process.stderr
    assert contents(stopped, *KEPT) == contents(out, *KEPT)


@pytest.fixture
def default_sigint():
    """The default handler of Ctrl-C, also where the tests run in a background job that ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stop_is_immediate_outside_a_step_and_waits_for_the_end_of_a_step(default_sigint):
    before, done = signal.getsignal(signal.SIGINT), []

    def work(hold: bool) -> None:
        with Interruption() as interruption, interruption.held() if hold else nullcontext():
            signal.raise_signal(signal.SIGINT)
            done.append("a step")
            signal.raise_signal(signal.SIGINT)  # a second signal stops at once
            done.append("more")

    with pytest.raises(Interrupted, match="SIGINT"):
        work(hold=False)
    assert done == []
    with pytest.raises(Interrupted, match="SIGINT"):
        work(hold=True)
    assert done == ["a step"]
    assert signal.getsignal(signal.SIGINT) is before


def test_interruption_does_nothing_outside_the_main_thread():
    found = []

    def work():
        with Interruption() as interruption, interruption.held():
            interruption.check()
            found.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["done"]


def test_a_folder_that_another_process_writes_to_is_refused(small_plan, data_file, tmp_path, capsys):
    out = tmp_path / "out"
    code = "import sys, time\nfrom pathlib import Path\nfrom experiments.storage.runfolder import only_writer\n"
    code += "with only_writer(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    out.mkdir()
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": PATH}, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        assert run.main(["--data", str(data_file), "--out", str(out)]) == 2
        assert f"process {other.pid} is writing to it" in capsys.readouterr().err
        assert sorted(path.name for path in out.iterdir()) == [".lock", ".writer"]
        other.stdin.close()
    assert run.main(["--data", str(data_file), "--out", str(out)]) == 0


def test_too_little_memory_ends_in_one_message_and_other_failures_are_not_hidden(
    small_plan, monkeypatch, data_file, tmp_path, capsys
):
    def fails(message):
        def work(self):
            raise RuntimeError(message)

        monkeypatch.setattr("experiments.study.suite.Suite.run", work)
        return run.main(["--data", str(data_file), "--out", str(tmp_path / "out")])

    assert fails("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes") == 1
    assert "stopped: DefaultCPUAllocator" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        fails("a bug")


def test_a_bug_in_the_preparation_is_not_reported_as_bad_input(monkeypatch, tmp_path):
    def bug(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(plans, "with_numeric_head", bug)
    with pytest.raises(ValueError, match="a bug"):
        run.main(["--numeric-head", "--out", str(tmp_path / "out")])


def test_the_reason_of_an_earlier_stop_is_forgotten(small_plan, monkeypatch, data_file, tmp_path):
    arguments = ["--data", str(data_file), "--out", str(tmp_path / "out")]
    assert run.main([*arguments, "--budget", "7e9"]) == 1
    monkeypatch.setattr("experiments.study.suite.Suite.run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.main([*arguments, "--budget", "8e9"])
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["budget"], status["stopped"]) == (8 * 10**9, None)


def test_a_ledger_of_other_prices_ends_in_one_message(finished, small_plan, data_file, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    ledger = out / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"flops": ', '"flops": 1', 1))
    assert run.main(["--data", str(data_file), "--out", str(out)]) == 1
    assert "ledger.jsonl: step 0 of trial is booked at" in capsys.readouterr().err


def test_steps_of_a_lost_ledger_are_booked_again(finished, small_plan, data_file, tmp_path):
    out, again = finished[0], tmp_path / "again"
    shutil.copytree(out, again)
    (again / "ledger.jsonl").unlink()
    (again / "experiments" / "final" / "metrics.json").unlink()
    assert run.main(["--data", str(data_file), "--out", str(again)]) == 0
    booked = [sorted((p / "ledger.jsonl").read_text().splitlines()) for p in (out, again)]
    assert booked[0] == booked[1]


def test_a_budget_that_does_not_suffice_ends_with_a_report_and_a_larger_one_continues(
    small_plan, data_file, tmp_path, capsys
):
    arguments = ["--data", str(data_file), "--out", str(tmp_path / "a")]
    assert run.main([*arguments, "--budget", "7e9"]) == 1
    err = capsys.readouterr().err
    assert "plan quick needs up to" in err
    assert "Fits: untrained, trial, grid-r2-lr0.001. Does not fit: grid-r2-lr0.01" in err
    assert "stopped: grid-r2-lr0.01 needs" in err
    assert (tmp_path / "a" / "report.html").exists()
    assert "Not finished" in (tmp_path / "a" / "report.md").read_text()
    assert Ledger(tmp_path / "a" / "ledger.jsonl", budget=10**17).spent <= 7e9
    assert run.main(arguments) == 0
    assert "Not finished" not in (tmp_path / "a" / "report.md").read_text()


def test_a_folder_of_another_run_is_refused_and_left_alone(finished, small_plan, data_file, tmp_path, capsys):
    out, _ = finished
    before = contents(out, "**/*")
    base = ["--data", str(data_file), "--out", str(out)]
    for other in (["--seed", "1"], ["--dtype", "bfloat16"], ["--sequences", "2"], ["--convention", "exact"]):
        assert run.main([*base, *other]) == 2
        assert "choose another --out" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert run.main(["--data", str(data_file), "--out", str(tmp_path)]) == 2
    assert "exists but has no run" in capsys.readouterr().err
    assert contents(out, "**/*") == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def damaged(tmp_path, name):
    """Write a data file with one fault; return its path."""
    path = tmp_path / f"{name}.h5"
    good = data.simulate(seed=0, num_systems=8)
    with h5py.File(path, "w") as file:
        file["time"] = good.time[:70] if name == "short" else good.time
        if name != "missing":
            file["trajectories"] = {"nan": good.trajectories * np.nan, "short": good.trajectories[:, :70]}.get(
                name, good.trajectories[:5]
            )
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--data", "missing"], "expected the arrays"),
        (["--data", "nan"], "is nan"),
        (["--data", "few"], "cannot be split"),
        (["--data", "short"], "70 time steps, expected at least 70 context"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_input_ends_in_one_message_and_writes_nothing(tmp_path, capsys, arguments, message):
    if arguments[0] == "--data":
        arguments = ["--data", damaged(tmp_path, arguments[1])]
    before = list(tmp_path.iterdir())
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [["--plan", "none"], ["--sequences", "0"], ["--dtype", "int8"], *[["--budget", x] for x in ("0.5", "inf", "much")]],
)
def test_unknown_choices_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_context_longer_than_a_trajectory_is_refused(monkeypatch, data_file, tmp_path, capsys):
    long = plans.Plan("quick", (plans.Experiment("trial", "6.2", Training(2, 1e-3, 1500, 2)),))
    monkeypatch.setitem(plans.PLANS, "quick", lambda seed: long)
    assert run.main(["--data", str(data_file), "--out", str(tmp_path / "out")]) == 2
    assert "context 1500 is longer than a trajectory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_of_one_experiment_gives_its_part_of_the_report(small_plan, data_file, tmp_path):
    assert run.main(["--plan", "untrained", "--data", str(data_file), "--out", str(tmp_path / "out")]) == 0
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "Figure 4:" in markdown
    assert "Grid of rank" not in markdown
    assert Ledger(tmp_path / "out" / "ledger.jsonl", budget=1).spent == 0


def test_experiments_beyond_the_report_are_shown(monkeypatch, data_file, tmp_path):
    settings = Training(2, 1e-3, 768, 2, stride=10, numeric_head=True, whole_windows=True, cosine=True)
    beyond = plans.Plan("frontier", (plans.Experiment("frontier", "frontier", settings, splits=("val", "test")),))
    monkeypatch.setitem(plans.PLANS, "frontier", lambda seed: beyond)
    monkeypatch.setattr(gru, "STEPS", 3)
    arguments = ["--plan", "frontier", "--data", str(data_file), "--out", str(tmp_path), "--samples", "2"]
    assert run.main(arguments) == 0
    markdown = (tmp_path / "report.md").read_text()
    assert "frontier: rank 2, learning_rate 0.001, context 768" in markdown
    assert "10^16.91" not in markdown  # the cost of the study's whole suite
    assert (tmp_path / "figures" / "frontier-losses.png").exists()
    # two samples are too few for both intervals, whose columns are left out
    header = next(line for line in markdown.splitlines() if line.startswith("| method | samples |"))
    assert header.endswith("| CRPS | interval |")
    assert "with the central 80 % of its samples" not in markdown
    line = json.loads((tmp_path / "experiments" / "frontier" / "forecasts.val.jsonl").read_text().splitlines()[0])
    assert [quantile is None for quantile in line["quantiles"]] == [True, True, False, True, True]


def test_a_model_with_too_few_positions_is_refused(small_plan, data_file, tmp_path, capsys):
    from qwen_min.weights import TINY

    shutil.copytree(TINY, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 800}))
    assert run.main(["--model", str(config.parent), "--data", str(data_file), "--out", str(tmp_path / "out")]) == 2
    assert "has 800 positions, plan quick needs 1321" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_state_stops_the_run_with_one_message(data_file, tmp_path):
    out = tmp_path / "killed"
    start("--data", data_file, "--out", out, before=KILL)
    state = out / "experiments" / "final" / "state.safetensors"
    state.write_bytes(b"{")
    process = start("--data", data_file, "--out", out)
    assert process.returncode == 1
    assert "state.safetensors: not a state of this training" in process.stderr
    assert "Traceback" not in process.stderr
    assert (out / "report.html").exists()


def test_the_report_plan_names_experiments_that_do_not_fit_the_budget(monkeypatch, tmp_path):
    """The sizes are those of the real model; nothing runs."""
    from types import SimpleNamespace

    from experiments.study.judging import Judge
    from experiments.study.suite import Suite
    from qwen_min import QwenConfig

    sizes = SimpleNamespace(config=QwenConfig(151936, 896, 4864, 24, 14, 2, 32768, 1e-6, 1e6, True))
    judge = Judge(sizes, None, None, None, {}, {}, "", 0, 0)

    def warning(convention, budget=10**17):
        ledger = Ledger(tmp_path / "ledger.jsonl", budget)
        return Suite(plans.study(0), tmp_path, judge, ledger, convention, ("", ""), None).budget_warning()

    assert "Does not fit: final." in warning("study")
    assert "needs up to 1.145e+17 FLOPs" in warning("study")
    assert warning("published") is None
    assert warning("study", budget=2 * 10**17) is None


def test_the_report_plan_has_the_experiments_of_the_report():
    plan = plans.study(seed=0)
    assert [e.training.steps for e in plan.experiments if e.training] == [500, *[1000] * 12, 3000]
    assert {e.training.batch for e in plan.experiments if e.training} == {4}
    assert len({(e.training.rank, e.training.learning_rate) for e in plan.experiments if e.section == "6.3"}) == 9
    assert [e.name for e in plan.experiments if "test" in e.splits] == ["untrained", "final"]


def test_help_does_not_wait_for_torch():
    code = "import sys; from experiments import run; run.parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": PATH})


@pytest.mark.parametrize("damage", ["plan.json", "baselines.json", "experiments/trial/forecasts.val.jsonl"])
def test_a_damaged_run_folder_gives_no_report(finished, tmp_path, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / damage).write_text("{")
    command = [sys.executable, "-m", "experiments.report", tmp_path / "run"]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PATH})
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert os.path.basename(damage) in process.stderr
    with pytest.raises(RunError):
        load_run(tmp_path / "run")


def test_populations_far_beyond_the_training_part_are_refused_before_anything_runs(small_plan, tmp_path, capsys):
    found = data.simulate(seed=0, num_systems=20)
    found.trajectories[data.split(20).test[0], 75, 0] = 1e4
    data.write(tmp_path / "wild.h5", found)
    assert run.main(["--data", str(tmp_path / "wild.h5"), "--out", str(tmp_path / "out")]) == 2
    assert "expected less than 100" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
