"""The walkthrough runs from top to bottom, and its committed outputs come from such a run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "walkthrough.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(cell) -> str:
    """The text that a cell printed, and a word for each picture that it shows."""
    printed = "".join(output.get("text", "") for output in cell.outputs)
    return printed + "picture " * sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_it_runs_from_top_to_bottom(notebook):
    committed = [outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    found = [outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert [text.count("picture ") for text in found] == [text.count("picture ") for text in committed]
    assert [bool(text) for text in found] == [bool(text) for text in committed]


def test_its_outputs_are_committed_and_name_no_machine(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("picture" in outputs(cell) for cell in code) >= 10
    for cell in code:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data")
            assert output.get("name") != "stderr"
            assert not re.search(r"/(?:root|home|tmp|usr|work|Users)/", output.get("text", ""))
