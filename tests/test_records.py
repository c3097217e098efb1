"""Typed readers of a run's files: errors name the file and the field, and come before any figure is drawn."""

import re
import shutil
from pathlib import Path

import pytest

from experiments.report.build import write_report
from experiments.report.results import load_run
from experiments.storage.files import RunError
from tests import small_plan


@pytest.fixture
def frontier(tmp_path) -> Path:
    drawn = shutil.ignore_patterns("*.png", "*.md", "*.html", "adapter")
    return shutil.copytree(Path(__file__).parents[1] / "results/frontier", tmp_path / "frontier", ignore=drawn)


def change(path: Path, written: str, damage: str, times: int = 1) -> None:
    """Replace the first so many places in a file that match a regular expression, or all if times is 0."""
    changed, found = re.subn(written, damage, path.read_text(), count=times, flags=re.DOTALL)
    assert found
    path.write_text(changed)


FILES = "settings.json metrics.json seconds.json losses.csv forecasts.test.jsonl".split()
SETTINGS, METRICS, SECONDS, LOSSES, TESTS = (f"experiments/frontier/{name}" for name in FILES)


@pytest.mark.parametrize(("file", "written", "damage", "message"), [
    ("plan.json", '"batch": 4', '"batch": 0', "experiments.0., training: batch is 0"),
    ("plan.json", '"val"', "1", r"splits\[0\]: holds 1, expected str"),
    ("baselines.json", r'"mse_each": \[[^]]*', '"mse_each": [1.0', r"number of mse_each is {'val': 1, .*, expected"),
    ("baselines.json", ".+", "{}", "holds no baseline"),
    ("status.json", r"\d+", "0", r"budget: holds 0, expected int from 1 to 1e\+300"),
    ("status.json", r"\d+", "NaN", "contains NaN, which JSON does not allow"),
    ("ledger.jsonl", r"\Z", "{\n", "not JSON lines"),
    (SETTINGS, '"rank": 8', '"rank": null', "the training has no rank, expected all its settings"),
    (SETTINGS, '"training": {.*?}', '"training": null', r"conventions with FLOPs is .*, expected \[\]"),
    (METRICS, '"mse_filled"', '"other"', "val, first: has no 'mse_filled'"),
    (METRICS, '"probabilistic": {.*?}', '"probabilistic": null', "mean_of_samples needs probabilistic"),
    (SECONDS, ".+", "{}", r"the list of parts is \[\], expected \['evaluation', 'training'\]"),
    (LOSSES, "0,[^\n]*\n", "", "the number of losses is 299, expected 300"),
    (LOSSES, "0,[^\n]*", "0,nan", "holds a number that is not finite"),
    (TESTS, "[^\n]*\n", "", "the number of forecasts is 149, expected 150"),
    (TESTS, r'"forecast":\[.*?\],', '"forecast":[', "the number of steps is 29, expected 30"),
])  # fmt: skip
def test_damage_in_a_run_folder_is_found_when_it_is_read(frontier, file, written, damage, message):
    change(frontier / file, written, damage)
    with pytest.raises(RunError, match=f"{Path(file).name}.*{message}"):
        load_run(frontier)


def test_a_torn_line_of_the_ledger_does_not_count(frontier):
    before = load_run(frontier).spent
    change(frontier / "ledger.jsonl", r"\Z", '{"experiment": "frontier", "ste')
    assert load_run(frontier).spent == before


def test_sequences_without_a_forecast_are_left_out(frontier, monkeypatch):
    small_plan.install(put=monkeypatch.setattr)
    without = f'"forecast":{[[None, None]] * 30},"mse":None,"new":1}}\n'.replace("None", "null")
    change(frontier / TESTS, '"forecast"[^\n]*\n', without, times=0)
    markdown = write_report(frontier).with_suffix(".md").read_text()
    assert "the test sequences with the largest errors" not in markdown
