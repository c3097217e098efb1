"""The documents: every command parses and runs, links lead somewhere, an example prints what the page says.

The commands run one after the other, in a folder that has what they name: copies of the embedded checkpoint, trainings
of two steps, neither a GPU nor a second machine. CI runs the main command, test_benchmark.py the benchmark.
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
from glob import glob
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from experiments import __main__ as command
from experiments.study import data, plans
from qwen_min.weights import TINY
from test_text import TEMPLATE
from tests import small_plan

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
VERB_OF = {module.removesuffix(".__main__"): verb for verb, (module, _) in command.VERBS.items()}
SMALLER = {  # by what is written: what runs here
    "--plan study --model Qwen/Qwen2.5-0.5B-Instruct": "--plan quick",
    "--plan study --model FOLDER": "--plan trial --out runs/study --model FOLDER",
    "--plan overnight --model FOLDER": "--plan trial --model FOLDER",
    "python -m experiments.run --plan": "python -m experiments.run --data lotka_volterra_data.h5 --plan",
    "--budget 1e15": "--budget 5e9",
    "--model 0.5B --batch 4 --context 512": "--model tiny --batch 2 --context 64",
    "--budget 1e12": "--budget 1e9",
    "--horizon 20 --device cuda": "--horizon 20 --budget 1e9",  # without a budget it takes 300 steps
    " --device cuda": "",
    " --dtype bfloat16": "",  # which most CPUs emulate slowly
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--nnodes 2 ": "",
    "--rdzv-backend c10d --rdzv-endpoint HOST:PORT": "--standalone",
    " 2 -m experiments.run --plan quick": f" 2 {ROOT / 'tests' / 'small_plan.py'} --plan untrained --sequences 1 "
    "--data predators.h5 --samples 9 --out runs/two",
}


def commands(path: Path) -> list[str]:
    """The commands in the fenced blocks of a page; those in blocks with a language are quoted from elsewhere."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for language, block in found if not language for line in block.splitlines()]
    parts = [part.partition("#")[0].strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("qwen-min ", "python -m experiments.", "torchrun"))]


COMMANDS = {page.name: commands(page) for page in PAGES}
ELSEWHERE = ("python -m experiments.run", *COMMANDS["speed.md"])
LINES = [line for lines in COMMANDS.values() for line in lines if line not in ELSEWHERE]
EXAMPLES = [
    (page, code)
    for page in PAGES
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
]


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
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert target.startswith("http") or file.exists(), target
        headings = re.findall("^#+ (.*)", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[page.name for page, _ in EXAMPLES])
def test_an_example_prints_what_its_page_says(monkeypatch, capsys, page, code):
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert (printed := capsys.readouterr().out.strip())
    assert printed in page.read_text()


def test_the_readme_counts_lines():
    found = re.findall(r"^\| `(\w+)/` \| ([\d,]+) \|", README, re.MULTILINE)
    assert [name for name, _ in found] == ["qwen_min", "lora", "flops", "experiments", "tests", "scripts"]
    for name, lines in found:
        counted = sum(len(path.read_text().splitlines()) for path in (ROOT / name).rglob("*.py"))
        assert int(lines.replace(",", "")) == pytest.approx(counted, rel=0.05), name


def smaller(line: str) -> str:
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
    written = shutil.ignore_patterns("*.forecast.csv")  # by who tried the commands of the README
    shutil.copytree(ROOT / "examples", place / "examples", ignore=written)
    systems = data.simulate(seed=0, num_systems=20)
    for name in ("lotka_volterra_data.h5", "predators.h5"):
        data.write(place / name, systems)
    (place / "data").mkdir()
    for name, series in zip(("data/a", "data/b", "new"), systems, strict=False):
        np.savetxt(place / f"{name}.csv", series[:60], fmt="%.4f", delimiter=",", header="prey,predator", comments="")
    return place


@pytest.fixture
def small(monkeypatch, folder):
    """Small runs of every fourth experiment, trainings of two steps, and questions for the chat."""

    def shortened(plan):
        parts = [replace(e, training=e.training and replace(e.training, steps=2)) for e in plan.experiments[::4]]
        return replace(plan, experiments=tuple(parts))

    small_plan.install(put=monkeypatch.setattr)
    for name, plan in plans.PLANS.items():
        monkeypatch.setitem(plans.PLANS, name, lambda seed, plan=plan: shortened(plan(seed)))
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    monkeypatch.chdir(folder)


def expanded(line: str, folder) -> list[str]:
    """The words of a command, with the files that its patterns match."""
    return [part for word in shlex.split(line) for part in sorted(glob(word, root_dir=folder)) or [word]]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("torchrun")])
def test_a_command_of_the_documents_runs(small, monkeypatch, capsys, folder, line):
    monkeypatch.setattr(sys, "argv", ["qwen-min", *arguments(expanded(smaller(line), folder))])
    assert command.main() == 0
    if line.endswith("--backtest"):  # the README shows what it prints
        assert re.search(r"^```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted({smaller(line) for line in LINES if line.startswith("torchrun")}))
def test_a_command_with_torchrun_runs(folder, line):
    words = [sys.executable, "-m", "torch.distributed.run", *expanded(line, folder)[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
