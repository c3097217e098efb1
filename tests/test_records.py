"""Typed readers of a run's files: errors name the file and the field, and come before any figure is drawn."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments.report.build import write_report
from experiments.report.results import load_run
from experiments.storage.files import RunError
from experiments.storage.records import Interval, Matrix, build
from experiments.study.records import read_losses
from tests import small_plan

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Inner:
    share: float | None

    def __post_init__(self):
        if self.share == 13:
            raise ValueError("share is 13, expected another")


@dataclass(frozen=True)
class Outer:
    count: int
    inners: dict[str, Inner]
    pair: Interval | None = None
    names: tuple[str, ...] = ()
    matrix: Matrix | None = None


GOOD = {"count": 1, "inners": {"a": {"share": None}, "b": {"share": 2}}}


def test_a_dataclass_is_built_from_json():
    more = {"pair": [1, 2.5], "names": ["x"], "matrix": [[1, None]], "new": {}}
    record = build(Outer, GOOD | more, "file")
    assert record.inners == {"a": Inner(None), "b": Inner(2.0)}
    assert (record.count, record.pair, record.names) == (1, (1.0, 2.5), ("x",))
    np.testing.assert_array_equal(record.matrix, [[1.0, np.nan]])
    assert build(Outer, GOOD, "file").matrix is None


@pytest.mark.parametrize(("change", "message"), [
    ({"count": 1.0}, "count: holds 1.0, expected int"),
    ({"inners": {"a": {}}}, "inners, a: has no 'share'"),
    ({"inners": {"a": {"share": 13}}}, "inners, a: share is 13, expected another"),
    ({"inners": {"a": {"share": float("inf")}}}, "inners, a, share: holds inf, expected float"),
    ({"pair": [1]}, r"pair: holds \[1\], expected 2 values"),
    ({"names": ["x", 1]}, r"names\[1\]: holds 1, expected str"),
    ({"matrix": [[1], [2, 3]]}, "matrix: .* expected numbers of rank 2"),
])  # fmt: skip
def test_damage_is_named(change, message):
    with pytest.raises(RunError, match=f"file, {message}"):
        build(Outer, GOOD | change, "file")


@pytest.mark.parametrize(("text", "message"), [
    ("step,loss\n0,1.5\n", "holds 1 losses, expected 2"),
    ("step,loss\n0,1.5\n1,nan\n", "holds a number that is not finite"),
    ("step\n0\n1\n", "not a table of loss"),
])  # fmt: skip
def test_losses_need_one_row_for_each_step(tmp_path, text, message):
    path = tmp_path / "losses.csv"
    path.write_text("step,loss\n0,1.5\n1,0.5\n")
    assert read_losses(path, 2) == [1.5, 0.5]
    path.write_text(text)
    with pytest.raises(RunError, match=f"losses.csv: {message}"):
        read_losses(path, 2)


@pytest.fixture
def frontier(tmp_path):
    drawn = shutil.ignore_patterns("*.png", "*.md", "*.html", "adapter")
    return shutil.copytree(RESULTS / "frontier", tmp_path / "frontier", ignore=drawn)


def change(path: Path, *keys, value) -> None:
    document = owner = json.loads(path.read_text())
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = value
    path.write_text(json.dumps(document))


def change_lines(path: Path, **values) -> None:
    lines = [json.loads(line) | values for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


SETTINGS, METRICS, TESTS = (f"experiments/frontier/{name}" for name in
                            ("settings.json", "metrics.json", "forecasts.test.jsonl"))  # fmt: skip


@pytest.mark.parametrize(("file", "keys", "value", "message"), [
    ("plan.json", ["identity", "experiments", 0, "training", "batch"], 0, "experiments.0., training: batch is 0"),
    ("baselines.json", ["VAR(18)", "test", "mse_each"], [1.0], r"VAR\(18\): has mse_each of .*'test': 1\}, expected"),
    ("status.json", ["budget"], 0, "the budget is 0"),
    (SETTINGS, ["training", "rank"], None, "the training has no rank, expected all its settings"),
    (METRICS, ["val", "all", "mse_filled"], "low", "val, all, mse_filled: holds 'low', expected float"),
    (SETTINGS, ["flops", "exact"], -1, "flops are .* expected positive numbers"),
    (METRICS, ["test", "probabilistic"], None, "mean_of_samples needs probabilistic"),
    ("experiments/frontier/seconds.json", ["training"], "long", "training: holds 'long', expected float"),
])  # fmt: skip
def test_damage_in_a_run_folder_is_found_when_it_is_read(frontier, file, keys, value, message):
    change(frontier / file, *keys, value=value)
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
    lines = (frontier / TESTS).read_text().splitlines(keepends=True)
    (frontier / TESTS).write_text("".join(lines[1:]))
    with pytest.raises(RunError, match="forecasts of 149 test sequences, expected 150"):
        load_run(frontier)
    change_lines(frontier / "test.jsonl", truth=[[1.0, 2.0]] * 29)
    (frontier / TESTS).write_text("".join(lines))
    with pytest.raises(RunError, match=r"a test forecast has not as many steps as its truth in test\.jsonl"):
        load_run(frontier)


def test_scores_that_need_more_samples_are_left_out_and_so_are_sequences_without_a_forecast(frontier, monkeypatch):
    small_plan.install(put=monkeypatch.setattr)
    for split in ("val", "test"):
        change(frontier / METRICS, split, "probabilistic", "coverage_80", value=None)
        change_lines(frontier / f"experiments/frontier/forecasts.{split}.jsonl", quantiles=None, new=1)
    change_lines(frontier / TESTS, mse=None, forecast=[[None, None]] * 30)
    markdown = write_report(frontier).with_suffix(".md").read_text()
    covered = json.loads((frontier / METRICS).read_text())["test"]["probabilistic"]["coverage_50"]
    assert re.search(rf"\| frontier, test \| 20 \| .* \| {100 * covered:.1f} % \|\n", markdown)
    assert "| 80 % interval |" not in markdown
    assert "band=array" not in (frontier / "figures" / "first.png").read_text()
    assert "the test sequences with the largest errors" not in markdown
