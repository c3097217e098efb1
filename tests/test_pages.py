"""Pages and figures: names that are no markup, the page of a fine-tuning, figures as readers need them."""

import json
import re
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from experiments.report import figures
from experiments.report.build import write_report
from experiments.report.finetuned import Metrics, verdict
from experiments.report.words import markdown, number
from experiments.storage.files import RunError
from experiments.storage.records import build
from tests.faults import contents

NAME = "<img src=x>| US$ % AU$ `c` *d*\n_e_ &lt; \\ [f](g)"


def metrics_of(after: list[float], ar: list[float]) -> dict:
    errors = {
        name: {"rmse": float(np.mean(each)) ** 0.5, "mae": [1.0], "each": each, "over": "series"}
        for name, each in (("before", [4.0] * len(after)), ("after", after), ("AR", ar))
    }
    numbers = {"horizon": 2, "samples": 0, "steps": 2, "best_step": 2, "spent": 20, "budget": 99}
    losses = {"held_out_before": 2.0, "held_out_after": 1.0, "unit": "standard deviations"}
    rows = [*range(len(after))]
    return {"split": "all", "series": rows, "groups": rows, "errors": errors} | numbers | losses


@pytest.fixture
def folder(tmp_path) -> Path:
    """A fine-tuning of two steps with ten forecasts, of contexts of 28 to 37 time steps."""
    plan = {"identity": {"variables": [NAME]}, "command": "finetune x", "title": NAME, "model": "tiny"}
    values = [[0.5], [0.7]]
    lines = [{"context": [[1.0]] * (28 + i), "truth": values, "after": values} for i in range(10)]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_of([1.0] * 10, [2.0] * 10)))
    (tmp_path / "forecasts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "losses.csv").write_text("step,loss\n0,1.5\n1,0.5\n")
    (tmp_path / "held_out.csv").write_text("steps,loss\n0,2.0\n2,1.0\n")
    return tmp_path


def test_a_name_is_text_on_both_pages_whatever_it_contains(folder):
    page = write_report(folder)
    assert f"<th>MAE, {escape(NAME)}</th>" in page.read_text()
    assert "<img src=x" not in page.read_text()
    lines = page.with_suffix(".md").read_text().splitlines()
    assert lines[0] == f"# Run {folder.name}: a fine-tuning on {markdown(NAME)}"
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {4}  # name, RMSE and one variable
    written = next(line for line in table if "MAE" in line)
    special = re.findall(r"(.)([<`*$_|]|&lt;|\]\()", written[written.index("MAE") : -1])
    assert [before for before, _ in special] == ["\\"] * 12
    assert re.sub(r"\\(\W|_)", r"\1", str(markdown(NAME))) == NAME.replace("\n", " ")


def test_the_page_tells_which_forecasts_it_draws_and_what_the_model_read(folder, monkeypatch):
    drawn = []
    plain = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: (drawn.append(figure), plain(figure, path)))
    settings = dict(matplotlib.rcParams)
    text = write_report(folder).with_suffix(".md").read_text()
    assert dict(matplotlib.rcParams) == settings  # those of the caller
    written = contents(folder, "**/*")
    write_report(folder)
    assert contents(folder, "**/*") == written  # the same numbers give the same files
    assert "reads up to 37 time steps" in text
    assert [axes.get_title() for axes in drawn[0].axes] == ["forecast 1", "forecast 6", "forecast 10"]
    assert "US$ % AU$" in drawn[0].axes[0].get_ylabel()  # no formula: `drawn` was written with these dollars
    assert 2 * text.count("![") == len(drawn) == 6
    assert drawn[2].axes[0].get_ylabel() == "held-out loss (standard deviations)"


def test_files_of_a_fine_tuning_that_do_not_agree_are_named(folder):
    (folder / "forecasts.jsonl").write_text("")
    with pytest.raises(RunError, match="its files do not agree"):
        write_report(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics_of([1.0, float("1e9")], [2.0]) | {"series": [0, 1, 2]}))
    with pytest.raises(RunError, match=r"metrics.json: before has errors of 2 forecasts, expected 3"):
        write_report(folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(RunError, match="the fine-tuning is not finished; its command continues it: finetune x"):
        write_report(folder)


@pytest.mark.parametrize(("after", "ar", "chance", "other_way"), [
    ([6e-6] * 40, [8e-7] * 40, False, False),  # far below the rounding of the study's units
    ([1.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.5], True, False),
    ([1.0], [2.0], True, False),
    ([0.0, 1.0, 2.0, 1.5], [9.0, 8.0, 9.0, 9.0], False, False),  # an error of 0 has no ratio
    ([1e-8] * 9 + [1e-6], [2e-8] * 10, True, True),  # this one too
])  # fmt: skip
def test_a_verdict_compares_in_one_measure_and_says_when_another_disagrees(after, ar, chance, other_way):
    text = verdict(build(Metrics, metrics_of(after, ar), ""))
    assert f"It is {'smaller' if np.mean(after) < np.mean(ar) else 'larger'} than that of the best baseline, AR" in text
    assert ("may be chance" in text) == chance
    assert ("the other way round" in text) == other_way


def test_a_verdict_counts_series_and_not_their_forecasts():
    """AR is better in one of five series, in all its eight forecasts."""
    metrics = metrics_of(([1.0] * 4 + [3.0]) * 8, [2.0] * 40)
    assert "may be chance" not in verdict(build(Metrics, metrics, ""))
    assert "may be chance" in verdict(build(Metrics, metrics | {"series": [*range(5)] * 8}, ""))


def test_a_picture_by_flops_shows_marks_side_by_side_and_names_that_do_not_cover_each_other(monkeypatch):
    """On logarithmic axes, whose numbers are no formulas; an error of 0 is left out."""
    drawn: list = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    one, two = (
        [(flops, error, error, error) for flops, error in each]
        for each in ([(1e15, 0.0), (1e15, 0.1), (1e17, 0.1)], [(0.999e15, 0.0005)])
    )
    levels = {f"level {i}": 0.3 + i / 1000 for i in range(5)}
    figures.against_flops({"one": one, "two": two}, levels | {"zero": 0.0}, "", Path("a"))
    figures._lay_out(drawn[0])
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    first, second = (line for line in axes.lines if line.get_marker() != "None")
    assert first.get_xdata()[1] < 0.99e15 < 1.01e15 < second.get_xdata()[0]
    assert first.get_marker() != second.get_marker()
    labels = {label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")}
    assert {"1e15", "1e16", "0.001", "0.1"} < labels
    assert not any("$" in label or "+" in label for label in labels)
    assert {text.get_text() for text in axes.texts} == {*levels}
    beside = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the levels
    assert not any(box.overlaps(other) for i, box in enumerate(beside) for other in beside[:i])
    assert all(axes.bbox.x1 < box.x0 and box.x1 < drawn[0].bbox.x1 for box in beside)


def test_a_number_is_written_without_an_exponent_unless_it_is_tiny():
    values = [0.0, 0.46689, 9.99e-5, 2.43e-5, 3e-9, None, float("nan")]
    assert [*map(number, values)] == "0.0000 0.4669 0.00010 0.000024 3.0e-09 - -".split()
