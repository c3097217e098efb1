"""Who may import whom, as docs/developing.md says: from commands down to the decoder, never up."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import EXTRAS, VERBS

ROOT = Path(__file__).parents[1]
COMMANDS = {"experiments.__main__", *(module for module, _ in VERBS.values())}
EXCEPTIONS = {"experiments.report.__main__": ["experiments.cli"]}
OURS = ("qwen_min", "lora", "flops", "experiments")
PAGE = (ROOT / "docs" / "developing.md").read_text()
TABLE = re.search(r"## Who imports whom\n\n```text\n(.*?)```", PAGE, re.DOTALL)[1]
ALLOWED = {  # by package: what a module of it may import besides its own package, and words that name nothing of ours
    package.replace("/", "."): [one if one in OURS else f"experiments.{one}" for one in re.findall(r"[\w.]+", names)]
    for packages, names in re.findall("^(.+?)  +(.+)$", TABLE, re.MULTILINE)
    for package in packages.split(", ")
    if package.startswith(OURS)
}


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imported(path: Path) -> set[str]:
    """What a file imports, anywhere in it, for types too; a name from a package as the package's module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {package + alias.name for alias in node.names}
    return found


IMPORTED = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): imported(path)
    for package in OURS
    for path in (ROOT / package).rglob("*.py")
}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package):
    for name in (name for name in IMPORTED if below(name, package)):
        ours = [one for one in IMPORTED[name] if below(one, *OURS)]
        allowed = [package, *ALLOWED[package], *EXCEPTIONS.get(name, [])]
        assert [one for one in ours if not below(one, *allowed)] == [], name


def test_every_file_has_its_rule_and_commands_do_not_import_each_other():
    for name in (name for name in IMPORTED if not below(name, *ALLOWED)):
        assert name in COMMANDS | {"experiments"}, "name its rule in docs/developing.md"
        assert [one for one in IMPORTED[name] if below(one, *COMMANDS - {name})] == [], name


def test_no_import_goes_in_a_circle():
    # a package itself stands for its names, not for all files in it
    arrows = {
        name: {other for other in IMPORTED if not below(name, other) and any(below(one, other) for one in found)}
        for name, found in IMPORTED.items()
    }
    while leaves := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows


@pytest.mark.slow
def test_what_draws_reports_and_prints_help_needs_no_torch_and_a_checkpoint_no_compiler():
    """Nor do text and FLOPs need the extra. In one process, as its start is slow."""
    code = f"""
import sys
import experiments.report.build, experiments.cli, experiments.benchmark, experiments.benchmarking.engines
import experiments.forecasting, experiments.run
experiments.run.parser().format_help()
assert "torch" not in sys.modules
import experiments.forecast, experiments.finetune, experiments.study.suite, experiments.training.finetuning, qwen_min
qwen_min.load("tiny")
assert "sympy" not in sys.modules  # of torch's compiler
for name in [one for one in sys.modules if one.split(".")[0] in {OURS}]:
    del sys.modules[name]
sys.modules |= dict.fromkeys({EXTRAS["experiments"]})  # None: not to be imported
import experiments.text, flops.trace, qwen_min.chat, lora
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
