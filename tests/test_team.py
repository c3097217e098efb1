"""Several processes under torchrun (gloo): the same numbers as one process, one writer, one message."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import teamwork
from experiments.study import data
from experiments.training.team import ALONE, StoppedElsewhere

HERE = Path(__file__).parent
PATH = os.pathsep.join((str(HERE), str(HERE.parent)))


def together(size: int, *arguments) -> subprocess.CompletedProcess:
    """Run teamwork.py in `size` processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        size,
        HERE / "teamwork.py",
    ]
    environment = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command), *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("size", [2, 4])
def test_a_training_in_fp64_is_that_of_one_process(tmp_path, size):
    """With batches of three rows of unequal length, four processes also have one without a row."""
    teamwork.train(str(tmp_path))
    process = together(size, "train", tmp_path)
    assert process.returncode == 0, process.stderr
    alone = load_file(tmp_path / "1-0.safetensors")
    assert len(alone["losses"]) == 6
    for rank in range(size):
        found = load_file(tmp_path / f"{size}-{rank}.safetensors")
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The small plan in one process and in two: (folder of the one, folder of the two, the process of the two)."""
    folder = tmp_path_factory.mktemp("team")
    data.write(folder / "small.h5", data.simulate(seed=0, num_systems=20))
    common = ["--data", folder / "small.h5", "--samples", "2", "--out"]
    alone = subprocess.run(
        [sys.executable, HERE / "teamwork.py", "run", *map(str, common), folder / "one"],
        env=os.environ | {"PYTHONPATH": PATH}, capture_output=True, text=True,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    return folder / "one", folder / "two", together(2, "run", *common, folder / "two")


def read(path: Path):
    return json.loads(path.read_text())


def test_two_processes_share_out_the_batches_and_give_the_same_results(runs):
    one, two, process = runs
    assert process.returncode == 0, process.stderr
    assert "2 processes share out the batches of each experiment" in process.stdout
    assert process.stdout.count("report: ") == 1
    assert (two / "ledger.jsonl").read_bytes() == (one / "ledger.jsonl").read_bytes()
    names = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(two) for path in sorted(two.rglob("*")) if path.is_file()]
    for name in names:
        if name.match("forecasts.*.jsonl"):
            ours, theirs = (
                [json.loads(line).get("text") for line in (run / name).read_text().splitlines()] for run in (one, two)
            )
            assert ours == theirs, name
        if name.match("metrics.json"):
            ours, theirs = (read(run / name)["val"]["all"] for run in (one, two))
            if "numbers" in name.parts:
                assert ours["mse"] == pytest.approx(theirs["mse"], rel=1e-3)
                continue
            assert ours["nats_per_value"] == pytest.approx(theirs["nats_per_value"], abs=1e-4), name
            assert ours["mse"] == theirs["mse"], name


def test_the_report_of_two_processes_is_that_of_one_but_for_times_and_the_command(runs):
    one, two, _ = runs

    def lines(run: Path) -> list[str]:
        text = (run / "report.md").read_text()
        text = re.sub(r"\| \d+ (s|min) ", "| time ", text)  # the two columns of the table of costs
        return [line for line in text.splitlines() if "teamwork.py" not in line and "experiments.run" not in line]

    different = [(a, b) for a, b in zip(lines(one), lines(two), strict=True) if a != b]
    assert not different


def test_an_error_of_all_processes_is_told_once(runs, tmp_path):
    one, _, _ = runs
    process = together(2, "run", "--data", one / "no-such-file.h5", "--out", tmp_path / "never")
    assert process.returncode != 0
    assert process.stderr.count("error: ") == 1
    assert "no-such-file.h5" in process.stderr
    assert not (tmp_path / "never").exists()


def test_a_budget_that_does_not_suffice_is_told_once_and_never_exceeded(runs, tmp_path):
    one, _, _ = runs
    spent = read(one / "status.json")["spent"]
    process = together(2, "run", "--data", one.parent / "small.h5", "--samples", "2", "--out", tmp_path / "run",
                       "--budget", spent - 1)  # fmt: skip
    assert process.returncode != 0
    assert process.stderr.count("stopped: ") == 1
    status = read(tmp_path / "run" / "status.json")
    assert "numbers needs" in status["stopped"]
    assert status["spent"] == spent - read(one / "experiments" / "numbers" / "settings.json")["flops"]["study"]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_team_of_one_only_computes():
    tensor = torch.tensor([1.0, 2.0])
    ALONE.add_up([tensor])
    assert tensor.tolist() == [1, 2]
    assert ALONE.share([1, 2, 3]) == ALONE.collect([1, 2, 3]) == [1, 2, 3]
    assert ALONE.told(lambda: 5) == ALONE.agreed(lambda: 5) == 5
    assert not issubclass(StoppedElsewhere, KeyboardInterrupt)
    with pytest.raises(ZeroDivisionError):
        ALONE.told(lambda: 1 / 0)
