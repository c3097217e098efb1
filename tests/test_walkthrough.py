"""The walkthrough runs from top to bottom, its answers are right, and its committed outputs come from such a run."""

import builtins
import os
import re
from collections import defaultdict
from pathlib import Path
from symtable import SymbolTable, symtable

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "walkthrough.ipynb"
TEACHING = NOTEBOOK.parent / "docs" / "teaching.md"
LEFT_OUT = ("def without(", "layer.mlp.gate_proj", "plans.study(", "svdvals(")  # in cells that TEACHING says can be
SMALLER = {  # by what is written: what runs here
    "steps=50,": "steps=4,",
    "length = 512 ": "length = 64 ",
    "(held_out[:, :70], horizon=10).values": "(held_out[:10, :70], horizon=10).values.repeat(15, 0)",
}


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def pictures(cell) -> list:
    """The outputs of a cell that are pictures."""
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def outputs(cell) -> str:
    """The text that a cell printed, and a word for each picture that it shows."""
    return "".join(output.get("text", "") for output in cell.outputs) + "picture " * len(pictures(cell))


@pytest.mark.slow
def test_it_runs_in_an_empty_folder_with_its_answers(notebook, tmp_path):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    committed = [outputs(cell) for cell in code]
    assert committed[-1].splitlines() == ["one not yet", "two not yet", "three not yet"]
    (blanks,) = [cell for cell in code if cell.source.startswith("one = None\n")]
    blanks.source = "\n".join(re.findall(r"^```python\n(.*?)^```", notebook.cells[-1].source, re.DOTALL | re.MULTILINE))
    for written, here in SMALLER.items():
        (cell,) = [cell for cell in code if written in cell.source]
        cell.source = cell.source.replace(written, here)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(NOTEBOOK.parent), "OMP_NUM_THREADS": "1"})
    found = [outputs(cell) for cell in code]
    assert found[-1].splitlines() == ["one right", "two right", "three right"]
    assert [text.count("picture ") for text in found] == [text.count("picture ") for text in committed]
    assert [bool(text) for text in found] == [bool(text) for text in committed]
    assert not any("False" in text for text in found)  # what is written by hand gives what the project's code gives
    assert [*tmp_path.iterdir()] == []


def test_it_is_a_small_file_that_stands_alone_with_its_outputs_and_describes_its_pictures(notebook):
    assert NOTEBOOK.stat().st_size < 500_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in shown} == {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" or "False" in output.get("text", "") for output in shown)
    assert not any(re.search(r"/(?:root|home|tmp|usr|work|Users)/", output.get("text", "")) for output in shown)
    alts = [picture.metadata["image/png"]["alt"] for cell in code for picture in pictures(cell)]
    assert len(alts) >= 10
    assert min(map(len, alts)) > 20
    links = [link for cell in notebook.cells if cell not in code for link in re.findall(r"\]\(([^)]*)\)", cell.source)]
    assert all(link.startswith("https://") for link in links)


def read(table: SymbolTable) -> set[str]:
    """The global names that a cell reads, itself and in its functions."""
    top = table.get_type() == "module"
    names = {one.get_name() for one in table.get_symbols() if one.is_referenced() and (top or one.is_global())}
    return names.union(*map(read, table.get_children()))


def test_nothing_uses_what_can_be_left_out(notebook):
    """A cell uses its own chapter, those that the page for teachers says it needs, and no cell that can be left out."""
    needs, given, chapter = {0: {0}}, defaultdict(set), 0
    for number, named in re.findall(r"^\| (\d)\. [^|]*\| ([^|]*)\|", TEACHING.read_text(), re.MULTILINE):
        needs[int(number)] = {0, int(number)}.union(*(needs[int(one)] for one in re.findall(r"\d", named)))
    assert [*needs] == [*range(10)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.match(r"## (\d)\. ", cell.source)
            chapter = int(heading[1]) if heading else chapter
            continue
        table = symtable(cell.source, "cell", "exec")
        bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
        assert read(table) <= bound.union(dir(builtins), *(given[one] for one in needs[chapter])), cell.source
        if not any(code in cell.source for code in LEFT_OUT):
            given[chapter] |= bound
