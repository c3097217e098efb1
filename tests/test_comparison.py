"""The pages of the runs that come with the project: their numbers, their figures, and what a comparison leaves out."""

import json
import shutil
from pathlib import Path

import pytest

from experiments.report import figures
from experiments.report.build import write_comparison, write_report
from tests import small_plan

pytestmark = pytest.mark.slow
RESULTS = Path(__file__).parents[1] / "results"
RUNS = sorted(plan.parent.name for plan in RESULTS.glob("*/plan.json"))


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """The committed runs, without their figures and pages; test_run.py draws figures."""
    small_plan.install(put=monkeypatch.setattr)
    drawn = shutil.ignore_patterns("*.png", "*.md", "*.html")
    return shutil.copytree(RESULTS, tmp_path / "results", ignore=drawn)


@pytest.mark.parametrize("name", RUNS)
def test_the_reports_that_come_with_the_project_match_their_files(results, name):
    page = write_report(results / name)
    markdown = page.with_suffix(".md").read_text()
    assert markdown == (RESULTS / name / "report.md").read_text()
    assert page.read_text().count("data:image/png;base64,") == markdown.count("![") > 0


def test_the_comparison_matches_its_runs_and_names_what_it_leaves_out(results, command):
    with pytest.warns(UserWarning, match="left out: quick"):
        page = write_comparison(results)
    assert page.read_text() == (RESULTS / "comparison.md").read_text()
    shutil.copytree(results / "trial", results / "no-baselines")
    (results / "no-baselines" / "baselines.json").unlink()
    (results / "mine").mkdir()  # a fine-tuning that was killed before its first check
    (results / "mine" / "plan.json").write_text('{"identity": {"variables": ["a"]}}')
    plan = shutil.copytree(results / "frontier", results / "short") / "plan.json"
    plan.write_text(plan.read_text().replace('"sequences": null', '"sequences": 10'))
    status, _, err = command("report", results)
    assert (status, err.count("warning: left out: ")) == (0, 4)
    for reason in ("mine: a fine-tuning on series of its own\n", "quick: other data_sha256 than frontier\n",
                   "short: other sequences than frontier\n", "no-baselines: "):  # fmt: skip
        assert f"Left out: {reason}" in page.read_text()


def test_figures_show_every_run(results, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "against_flops", lambda *given: drawn.setdefault(given[-1].stem, given))
    with pytest.warns(UserWarning, match="left out: quick"):
        write_comparison(results)
    path = results / "frontier" / "experiments" / "frontier"
    flops, metrics = (json.loads((path / f"{name}.json").read_text()) for name in ("settings", "metrics"))
    points, levels, *_ = drawn["test-all-by-flops"]
    counts = {"frontier": 1, "frontier, mean of 20 samples": 1, "numbers": 6, "whole": 3, "scratch": 2, "final": 1}
    assert {name: len(each) for name, each in points.items()} == counts | {"trial": 1}
    assert len(levels) == 7  # six baselines and the untrained model
    errors = metrics["test"]["mean_of_samples"]["all"]
    wanted = (flops["flops"]["study"], errors["mse_filled"], *errors["mse_interval"])
    assert points["frontier, mean of 20 samples"] == [wanted]


def test_a_folder_without_runs_is_refused(tmp_path, refused):
    assert "holds no plan.json, and no run folders to compare" in refused("report", tmp_path)
