"""The documents: every command parses and runs, links lead somewhere, an example prints what the page says.

The commands run one after the other, in a folder that has what they name: copies of the embedded checkpoint, trainings
of two steps, neither a GPU nor a second machine. CI runs those of the README; test_benchmark.py runs the benchmark.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from experiments import __main__ as command
from experiments.forecasting import gru
from experiments.study import data, plans
from qwen_min.weights import TINY
from test_text import TEMPLATE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VERB_OF = {module.removesuffix(".__main__"): verb for verb, (module, _) in command.VERBS.items()}
SMALLER = {  # by what is written: what runs here
    "--plan study --model Qwen/Qwen2.5-0.5B-Instruct": "--plan quick",
    "--budget 1e15": "--budget 2e10",
    "--budget 1e12": "--budget 1e10",
    "--horizon 20 --device cuda": "--horizon 20 --budget 2e10",  # without a budget it takes 300 steps
    " --device cuda": "",
    " --dtype bfloat16": "",  # which most CPUs emulate slowly
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--nnodes 2 ": "",
    "--rdzv-backend c10d --rdzv-endpoint HOST:PORT": "--standalone",
    " 2 -m experiments.run": f" 2 {ROOT / 'tests' / 'teamwork.py'} run",  # with the small plan
}


def commands(path: Path) -> list[str]:
    """The commands in the fenced blocks of a page; those in blocks with a language are quoted from elsewhere."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for language, block in found if not language for line in block.splitlines()]
    parts = [part.partition("#")[0].strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("qwen-min ", "python -m experiments.", "torchrun"))]


COMMANDS = {page.name: commands(page) for page in PAGES}
LINES = [line for page, lines in COMMANDS.items() if page not in ("README.md", "speed.md") for line in lines]


def arguments(words: list[str]) -> list[str]:
    """The words of a command after `qwen-min`."""
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        return rest if module == "experiments.text" else [VERB_OF[module], *rest]
    return words[1:]


@pytest.mark.parametrize("line", [line for lines in COMMANDS.values() for line in lines])
def test_a_command_in_the_documents_is_one_that_its_parser_takes(line):
    verb, *rest = arguments(shlex.split(line))
    module = command.VERBS[verb][0]
    import_module(module).parser().parse_args([verb, *rest] if module == "experiments.text" else rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_example_of_costs_prints_what_the_page_says(capsys):
    page = (ROOT / "docs" / "costs.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", page, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


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
    monkeypatch.setattr(sys, "argv", ["qwen-min", *arguments(expanded(smaller(line), folder))])
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
