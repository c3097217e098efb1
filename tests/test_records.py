"""Typed readers of a run's files: errors name the file and the field, and come before any figure is drawn."""

import json
import shutil
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from experiments.report.build import write_report
from experiments.report.results import load_run
from experiments.storage.files import RunError
from tests import small_plan

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture
def frontier(tmp_path):
    drawn = shutil.ignore_patterns("*.png", "*.md", "*.html", "adapter")
    return shutil.copytree(RESULTS / "frontier", tmp_path / "frontier", ignore=drawn)


def change_lines(path: Path, **values) -> None:
    lines = [json.loads(line) | values for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


FILES = "settings.json metrics.json forecasts.test.jsonl losses.csv".split()
SETTINGS, METRICS, TESTS, LOSSES = (f"experiments/frontier/{name}" for name in FILES)


@pytest.mark.parametrize(("file", "keys", "value", "message"), [
    ("plan.json", ["identity", "experiments", 0, "training", "batch"], 0, "experiments.0., training: batch is 0"),
    ("baselines.json", ["VAR(18)", "test", "mse_each"], [1.0], r"VAR\(18\): .* mse_each is .*'test': 1\}, expected"),
    ("plan.json", ["identity", "experiments", 0, "splits"], ["val", 1], r"splits\[1\]: holds 1, expected str"),
    ("baselines.json", [], {}, "holds no baseline"),
    ("status.json", ["budget"], 0, r"budget: holds 0, expected int from 1 to 1e\+300"),
    (SETTINGS, ["training", "rank"], None, "the training has no rank, expected all its settings"),
    (METRICS, ["val", "all"], {}, "val, all: has no 'mse_filled'"),
    (SETTINGS, ["training"], None, r"conventions with FLOPs is .*, expected \[\]"),
    (METRICS, ["test", "probabilistic"], None, "mean_of_samples needs probabilistic"),
    ("experiments/frontier/seconds.json", [], {}, r"the list of parts is \[\], expected \['evaluation', 'training'\]"),
])  # fmt: skip
def test_damage_in_a_run_folder_is_found_when_it_is_read(frontier, file, keys, value, message):
    document = [json.loads((frontier / file).read_text())]
    *above, last = 0, *keys
    reduce(getitem, above, document)[last] = value
    (frontier / file).write_text(json.dumps(document[0]))
    with pytest.raises(RunError, match=f"{Path(file).name}.*{message}"):
        load_run(frontier)


def test_a_damaged_ledger_and_missing_forecasts_are_found_and_a_torn_line_does_not_count(frontier):
    with (frontier / "ledger.jsonl").open("a") as file:
        file.write('{"experiment": "frontier", "ste')
    assert load_run(frontier).spent == json.loads((RESULTS / "frontier" / "status.json").read_text())["spent"]
    with (frontier / "ledger.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RunError, match=r"ledger\.jsonl: not JSON lines"):
        load_run(frontier)
    shutil.copy(RESULTS / "frontier" / "ledger.jsonl", frontier)
    for loss, message in (
        (1.5, "the number of losses is 1, expected 300"),
        ("nan", "holds a number that is not finite"),
    ):
        (frontier / LOSSES).write_text(f"step,loss\n0,{loss}\n")
        with pytest.raises(RunError, match=f"losses.csv: {message}"):
            load_run(frontier)
    shutil.copy(RESULTS / "frontier" / LOSSES, frontier / LOSSES)
    lines = (frontier / TESTS).read_text().splitlines(keepends=True)
    (frontier / TESTS).write_text("".join(lines[1:]))
    with pytest.raises(RunError, match=r"forecasts.test.jsonl: the number of forecasts is 149, expected 150"):
        load_run(frontier)
    change_lines(frontier / "test.jsonl", truth=[[1.0, 2.0]] * 29)
    (frontier / TESTS).write_text("".join(lines))
    with pytest.raises(RunError, match=r"forecasts.test.jsonl: the number of steps is 30, expected 29"):
        load_run(frontier)


def test_sequences_without_a_forecast_are_left_out(frontier, monkeypatch):
    small_plan.install(put=monkeypatch.setattr)
    change_lines(frontier / TESTS, mse=None, forecast=[[None, None]] * 30, new=1)
    markdown = write_report(frontier).with_suffix(".md").read_text()
    assert "the test sequences with the largest errors" not in markdown
