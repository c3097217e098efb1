"""The documents: commands that exist, options that are explained, links that lead somewhere.

`python -m tests.test_docs` writes docs/commands.md anew.
"""

import argparse
import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from experiments.__main__ import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {"experiments.report": "experiments.report.__main__"}


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, as the command `qwen-min` shows it."""
    module = VERBS[verb][0]
    before, sys.argv = sys.argv, ["qwen-min" if module == "experiments.text" else f"qwen-min {verb}"]
    try:
        parser = import_module(module).parser()
    finally:
        sys.argv = before
    if module == "experiments.text":
        (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        return verbs.choices[verb]
    return parser


def commands_page() -> str:
    """docs/commands.md: the help of each verb."""
    os.environ["COLUMNS"] = "100"
    lines = ["# Commands", "", "Each verb is also a module: `qwen-min run` is `python -m experiments.run`.", ""]
    for verb, (module, meaning) in VERBS.items():
        name = module.removesuffix(".__main__")
        words = f"python -m {name}" + (f" {verb}" if name == "experiments.text" else "")
        lines += [f"## qwen-min {verb}", "", f"{meaning[0].upper()}{meaning[1:]} (`{words}`).", ""]
        lines += ["```text", parser_of(verb).format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def blocks(path: Path) -> list[str]:
    """The commands in the fenced blocks of a page; those in blocks with a language are quoted from elsewhere."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for language, block in found if not language for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("qwen-min ", "python -m experiments.", "torchrun"))]


COMMANDS = [(path.name, line) for path in PAGES for line in blocks(path)]


def test_the_page_of_commands_is_what_the_commands_say_of_themselves(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = (ROOT / "docs" / "commands.md").read_text().split()
    assert words == commands_page().split(), "write it anew: python -m tests.test_docs"


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_in_the_documents_is_one_that_its_parser_takes(page, line):
    words = shlex.split(line.partition("#")[0])
    if "torchrun" in words:
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "qwen-min":
        verb, rest = words[1], words[2:]
    else:
        assert words[:2] == ["python", "-m"], line
        module, rest = MODULES.get(words[2], words[2]), words[3:]
        verb = next(verb for verb, (name, _) in VERBS.items() if name == module)
    parser_of(verb).parse_args(rest)


def test_every_verb_is_in_a_document():
    text = "".join(line for _, line in COMMANDS)
    shown = {verb for verb, (module, _) in VERBS.items() if f"qwen-min {verb}" in text or f"-m {module}" in text}
    assert {"forecast", "finetune", "run"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_example_of_costs_prints_what_the_page_says(capsys):
    code, printed = re.search(
        r"```python\n(.*?)```\s+```text\n(.*?)```", (ROOT / "docs/costs.md").read_text(), re.DOTALL
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


if __name__ == "__main__":
    (ROOT / "docs" / "commands.md").write_text(commands_page())
