"""The command line from end to end, on a plan that takes seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
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
from experiments.report.words import flops
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


def read(path: Path):
    return json.loads(path.read_text())


def contents(folder: Path, *patterns) -> dict[str, bytes]:
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def finished(data_file, tmp_path_factory):
    """A complete run in its own process: (folder, process)."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, start("--data", data_file, "--out", out)


NAMES = ["untrained", "trial", "grid-r2-lr0.001", "grid-r2-lr0.01", "context-32", "context-96", "final"]  # and numbers


def test_one_command_gives_a_finished_report(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().endswith(f"report: {out / 'report.html'}")
    assert "Numbers has a smaller test error than " in process.stdout
    assert "experiment 7 of 8: final\n" in process.stderr
    spent = Ledger(out / "ledger.jsonl", budget=10**17).by_experiment()
    for name in (*NAMES, "numbers"):
        metrics = read(out / "experiments" / name / "metrics.json")
        assert set(metrics) == ({"val", "test"} if name in ("untrained", "final", "numbers") else {"val"})
        assert metrics["val"]["all"]["sequences"] == 3
        assert ("mean_of_samples" in metrics["val"]) == (name == "final")
        assert spent.get(name) == read(out / "experiments" / name / "settings.json")["flops"].get("study")
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for table in ("Table 2", "Tables 3 and 4", "Table 5", "Table 6"):
        assert f"{table}: " in markdown
        assert f"{table}: " in page
    figures = [f"figure-{number:02d}" for number in range(2, 13)]
    for name in (*figures, "by-horizon", "first", "worst", "errors", "error-by-flops"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5000
    assert page.count("data:image/png;base64,") == 11 + 5
    assert "0.2702" in markdown  # published, next to ours
    assert markdown.count("| final, mean of 20 samples |") == 3  # in the results, and in two comparisons with numbers
    assert "numbers, exact contexts against the others, paired" in markdown
    assert not [*out.rglob("*.partial"), *out.rglob("*state.*")]


def test_the_best_settings_by_validation_are_taken_over(finished):
    folder = finished[0] / "experiments"
    trainings = {name: read(folder / name / "settings.json")["training"] for name in NAMES}
    errors = {name: read(folder / name / "metrics.json")["val"]["all"]["mse"] for name in NAMES}
    for names, candidates, keys in ((("context-32", "context-96"), NAMES[2:4], ("rank", "learning_rate")),
                                    (("final",), NAMES[2:6], ("rank", "learning_rate", "context"))):  # fmt: skip
        best = trainings[min(candidates, key=errors.get)]
        for name in names:
            assert [trainings[name][key] for key in keys] == [best[key] for key in keys]


def test_forecasts_and_samples_hold_what_the_metrics_say(finished):
    path = finished[0] / "experiments" / "final"
    metrics = read(path / "metrics.json")["test"]
    lines, drawn = (
        [json.loads(line) for line in (path / f"{kind}.test.jsonl").read_text().splitlines()]
        for kind in ("forecasts", "samples")
    )
    assert [line["id"] for line in lines] == [one["id"] for one in drawn] == data.split(20).test.tolist()
    forecast, truth = (np.array([line[name] for line in lines], dtype=float) for name in ("forecast", "truth"))
    assert forecast.shape == truth.shape == (3, 30, 2)
    errors = ((forecast - truth)[:, :10] ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(errors, [line["mse"] for line in lines], rtol=1e-4)
    assert errors.mean() == pytest.approx(metrics["all"]["mse"], rel=1e-4)
    assert np.array([line["quantiles"] for line in lines]).shape == (3, 5, 10, 2)
    samples = np.array([one["samples"] for one in drawn])
    assert samples.shape == (3, 20, 10, 2)
    np.testing.assert_array_equal(samples, samples.round(2))
    for name, value in scores.probabilistic(samples, truth[:, :10]).items():
        assert value == pytest.approx(metrics["probabilistic"][name], rel=1e-4)
    error = ((samples.mean(axis=1) - truth[:, :10]) ** 2).mean()
    assert error == pytest.approx(metrics["mean_of_samples"]["all"]["mse"], rel=1e-4)


def test_the_seed_of_a_run_reaches_its_samples_and_the_gru(small_plan, data_file, tmp_path):
    found = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        arguments = ["--plan", "untrained", "--data", str(data_file), "--samples", "2", "--sequences", "1"]
        assert run.main([*arguments, "--seed", str(seed), "--out", str(out)]) == 0
        line = json.loads((out / "experiments" / "untrained" / "samples.val.jsonl").read_text())
        gru_errors = json.loads((out / "baselines.json").read_text())["GRU trained on the 14"]["val"]["mse_each"]
        found.append((line["id"], line["samples"], gru_errors))
    assert Ledger(out / "ledger.jsonl", budget=1).spent == 0
    assert "Grid of rank" not in (out / "report.md").read_text()
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
import os, signal, experiments.training.loop
from flops import Ledger
plain = Ledger.debit
def debit(self, experiment, step, flops):
    plain(self, experiment, step, flops)
    if (experiment, step) == ("final", 3):
        os.kill(os.getpid(), signal.SIGKILL)
Ledger.debit = debit
"""
TERMINATE = KILL.replace("SIGKILL", "SIGTERM") + "experiments.training.loop.SAVE_SECONDS = 1000\n"


def test_a_killed_run_ends_with_the_same_bytes(finished, data_file, tmp_path):
    out, killed = finished[0], tmp_path / "killed"
    process = start("--data", data_file, "--out", killed, before=KILL)
    assert process.returncode == -signal.SIGKILL
    state = killed / "experiments" / "final" / "state.safetensors"
    for damage, message in (
        (None, " of a budget of 1e17 FLOPs"),
        ("status.json", " FLOPs in the convention study; no"),
    ):
        if damage:
            (killed / damage).unlink()
        page = write_report(killed).with_suffix(".md").read_text()
        assert "Not finished, and shown as -: final, numbers." in page
        spent = sum(json.loads(line)["flops"] for line in (killed / "ledger.jsonl").read_text().splitlines())
        assert f"Spent {flops(spent)}{message}" in page
    whole = state.read_bytes()
    state.write_bytes(b"{")
    process = start("--data", data_file, "--out", killed)
    assert process.returncode == 1
    assert "state.safetensors: not a state of this training" in process.stderr
    assert "Traceback" not in process.stderr
    state.write_bytes(whole)
    process = start("--data", data_file, "--out", killed)
    assert process.returncode == 0, process.stderr
    assert contents(killed, *KEPT) == contents(out, *KEPT)


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves_it(finished, data_file, tmp_path):
    out, stopped = finished[0], tmp_path / "stopped"
    process = start("--data", data_file, "--out", stopped, before=TERMINATE)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM; to continue from what is saved: python -m experiments.run --data")
    assert len(load_file(stopped / "experiments" / "final" / "state.safetensors")["losses"]) == 4
    assert read(stopped / "status.json")["stopped"] == "Stopped by SIGTERM."
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


def test_too_little_memory_ends_in_one_message_and_other_failures_are_not_hidden(
    small_plan, monkeypatch, data_file, tmp_path, capsys
):
    arguments = ["--data", str(data_file), "--out", str(tmp_path / "out")]
    errors = iter(
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("a bug"), ValueError("a bug"))
    )

    def fails(self):
        raise next(errors)

    monkeypatch.setattr("experiments.study.suite.Suite.run", fails)
    assert run.main(arguments) == 1
    assert "stopped: DefaultCPUAllocator" in capsys.readouterr().err
    for kind in (RuntimeError, ValueError):
        with pytest.raises(kind, match="a bug"):
            run.main(arguments)


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
    assert read(tmp_path / "a" / "status.json")["stopped"].startswith("grid-r2-lr0.01 needs")
    assert run.main(arguments) == 0
    assert "Not finished" not in (tmp_path / "a" / "report.md").read_text()
    assert read(tmp_path / "a" / "status.json")["stopped"] is None


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
    good = data.simulate(seed=0, num_systems=20 if name == "wild" else 8)
    if name == "wild":
        good.trajectories[data.split(20).test[0], 75, 0] = 1e4
    with h5py.File(path, "w") as file:
        file["time"] = good.time[:70] if name == "short" else good.time
        if name != "missing":
            file["trajectories"] = {
                "nan": good.trajectories * np.nan,
                "short": good.trajectories[:, :70],
                "wild": good.trajectories,
            }.get(name, good.trajectories[:5])
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
        (["--data", "wild"], "expected less than 100"),
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


def test_a_context_longer_than_a_trajectory_is_refused(monkeypatch, data_file, tmp_path, capsys):
    long = plans.Plan("quick", (plans.Experiment("trial", "6.2", Training(2, 1e-3, 1500, 2)),))
    monkeypatch.setitem(plans.PLANS, "quick", lambda seed: long)
    assert run.main(["--data", str(data_file), "--out", str(tmp_path / "out")]) == 2
    assert "context 1500 is longer than a trajectory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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


def test_the_plan_of_the_study_is_the_study_s_and_names_what_does_not_fit_the_budget(monkeypatch, tmp_path):
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

    plan = plans.study(seed=0)
    assert [e.training.steps for e in plan.experiments if e.training] == [500, *[1000] * 12, 3000]
    assert {e.training.batch for e in plan.experiments if e.training} == {4}
    assert len({(e.training.rank, e.training.learning_rate) for e in plan.experiments if e.section == "6.3"}) == 9
    assert [e.name for e in plan.experiments if "test" in e.splits] == ["untrained", "final"]


def test_help_does_not_wait_for_torch():
    code = "import sys; from experiments import run; run.parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": PATH})
