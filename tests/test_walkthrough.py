"""The walkthrough runs from top to bottom, its answers are right, and its committed outputs come from such a run."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "walkthrough.ipynb"
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
    assert all(len(picture.metadata["image/png"]["alt"]) > 20 for cell in code for picture in pictures(cell))
    links = [link for cell in notebook.cells if cell not in code for link in re.findall(r"\]\(([^)]*)\)", cell.source)]
    assert all(link.startswith("https://") for link in links)
