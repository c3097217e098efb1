"""Every command of the documents runs, one after the other, in a folder that has what they name.

The checkpoints there are copies of the embedded one, trainings take two steps, and there is neither a GPU nor a second
machine. CI runs the commands of the README as they are. The benchmark is run by test_benchmark.py.
"""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from experiments import __main__ as command
from experiments.forecasting import gru
from experiments.study import data, plans
from qwen_min.weights import TINY
from test_docs import COMMANDS, MODULES, ROOT
from test_text import TEMPLATE

SMALLER = {  # by what is written: what runs here
    "--plan study --model Qwen/Qwen2.5-0.5B-Instruct": "--plan quick",
    "--budget 1e15": "--budget 2e10",
    "--horizon 20 --device cuda": "--horizon 20 --budget 2e10",  # without a budget it takes 300 steps
    " --device cuda": "",
    " --dtype bfloat16": "",  # which most CPUs emulate slowly
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--nnodes 2 ": "",
    "--rdzv-backend c10d --rdzv-endpoint HOST:PORT": "--standalone",
    " 2 -m experiments.run": f" 2 {ROOT / 'tests' / 'teamwork.py'} run",  # with the small plan
}
ELSEWHERE = ("README.md", "speed.md")
LINES = [line for page, line in COMMANDS if page not in ELSEWHERE]


def smaller(line: str) -> str:
    """The command as it runs here."""
    for written, here in SMALLER.items():
        line = line.replace(written, here)
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the files that the documents name."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("FOLDER", "Qwen/Qwen2.5-0.5B-Instruct"):
        shutil.copytree(TINY, place / name)
        (place / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    shutil.copytree(ROOT / "examples", place / "examples")
    systems = data.simulate(seed=0, num_systems=20)
    data.write(place / "lotka_volterra_data.h5", systems)
    (place / "data").mkdir()
    for name, series in zip(("data/a", "data/b", "new"), systems.trajectories, strict=False):
        np.savetxt(place / f"{name}.csv", series[:60], fmt="%.4f", delimiter=",", header="prey,predator", comments="")
    return place


@pytest.fixture
def small(monkeypatch, folder):
    """Trainings of two steps, and questions for the chat."""

    def shortened(plan):
        parts = [replace(e, training=e.training and replace(e.training, steps=2)) for e in plan.experiments]
        return replace(plan, experiments=tuple(parts))

    for name, plan in plans.PLANS.items():
        monkeypatch.setitem(plans.PLANS, name, lambda seed, plan=plan: shortened(plan(seed)))
    monkeypatch.setattr(gru, "STEPS", 3)
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    monkeypatch.chdir(folder)


def expanded(line: str, folder) -> list[str]:
    """The words of a command, with the files that its patterns match."""
    found = []
    for word in shlex.split(line):
        found += sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]
    return found


@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("torchrun")])
def test_a_command_of_the_documents_runs(small, monkeypatch, folder, line):
    words = expanded(smaller(line), folder)
    if words[0] == "python":
        module = MODULES.get(words[2], words[2])
        words = ["", next(verb for verb, (name, _) in command.VERBS.items() if name == module), *words[3:]]
    monkeypatch.setattr(sys, "argv", ["qwen-min", *words[1:]])
    assert command.main() == 0


@pytest.mark.parametrize("line", sorted({smaller(line) for line in LINES if line.startswith("torchrun")}))
def test_a_command_with_torchrun_runs(folder, tmp_path, line):
    words = [sys.executable, "-m", "torch.distributed.run", *expanded(line, folder)[1:]]
    if "teamwork.py" in line:
        words += ["--data", "lotka_volterra_data.h5", "--samples", "2", "--out", tmp_path / "out"]
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pages_left_out_are_run_elsewhere():
    left_out = {line for page, line in COMMANDS if page in ELSEWHERE}
    ci = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for line in left_out:
        assert (
            any(one == line or one.startswith(f"{line} --out ") for one in ci)
            or line in LINES
            or line.startswith("python -m experiments.benchmark ")
        ), line
