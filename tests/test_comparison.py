import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.report import build as report
from experiments.report import comparison, figures
from experiments.report.build import write_report
from experiments.report.comparison import build, load_runs, write_comparison
from experiments.report.page import Blocks, to_markdown
from experiments.storage.files import RunError

RESULTS = Path(__file__).parents[1] / "results"
RUNS = sorted(plan.parent.name for plan in RESULTS.glob("*/plan.json"))


@pytest.fixture
def results(tmp_path) -> Path:
    """The committed runs, without their figures and pages."""
    drawn = shutil.ignore_patterns("*.png", "*.md", "*.html")
    shutil.copytree(RESULTS, tmp_path / "results", ignore=drawn)
    return tmp_path / "results"


@pytest.mark.parametrize("name", RUNS)
def test_the_reports_that_come_with_the_project_match_their_files(results, name):
    page = write_report(results / name)
    markdown = page.with_suffix(".md").read_text()
    assert markdown == (RESULTS / name / "report.md").read_text()
    assert markdown.count("![") == len(list((results / name / "figures").glob("*.png"))) > 0


def test_the_comparison_that_comes_with_the_project_matches_its_runs(results):
    markdown = write_comparison(results).read_text()
    assert markdown == (RESULTS / "comparison.md").read_text()
    assert markdown.count("![") == len(list(results.glob("*.png"))) == 3


def test_figures_show_every_run_with_what_was_published(results, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "against_flops", lambda *given: drawn.setdefault(given[2].stem, given))
    shutil.copytree(results / "frontier", results / "zzz")
    build(results, load_runs(results))
    path = results / "frontier" / "experiments" / "frontier"
    flops = json.loads((path / "settings.json").read_text())["flops"]["published"]
    metrics = json.loads((path / "metrics.json").read_text())
    text = {"frontier", "frontier, mean of 20 samples", "trial", "zzz: frontier", "zzz: frontier, mean of 20 samples"}
    short = {f"direct: direct-{steps}" for steps in (300, 1200, 4800, 9600)}  # not judged by the test set
    for name, split, part in (("val-first", "val", "first"), ("val-all", "val", "all"), ("test-all", "test", "all")):
        points, levels, _, hollow = drawn[f"{name}-by-flops"]
        assert set(points) == text | {"direct"} | (short if split == "val" else set())
        assert len(levels) == 7  # six baselines and the untrained model
        likeliest, mean = metrics[split][part], metrics[split]["mean_of_samples"][part]
        bars = [errors["mse_interval"] if part == "all" else [] for errors in (likeliest, mean)]
        assert points["frontier"] == (flops, likeliest["mse_filled"], *bars[0])
        assert points["frontier, mean of 20 samples"] == (flops, mean["mse_filled"], *bars[1])
        assert len(hollow) == (14 if part == "first" else 0)
    hollow = drawn["val-first-by-flops"][3]
    assert hollow["published: grid r8 lr0.0001"] == (10**15.68, 0.0071)
    assert hollow["published: final"] == (10**16.35, 0.0021)


def test_fine_tunings_in_the_same_folder_are_left_out(results):
    (results / "mine").mkdir()
    (results / "mine" / "plan.json").write_text("{}")
    (results / "mine" / "held_out.csv").write_text("steps,nats_per_value\n")
    assert [run.folder.name for run in load_runs(results)] == sorted(RUNS)


def test_runs_on_other_sequences_are_not_compared(results):
    plan = shutil.copytree(results / RUNS[0], results / "zzz") / "plan.json"
    held = json.loads(plan.read_text())
    held["identity"]["sequences"] = 10
    plan.write_text(json.dumps(held))
    with pytest.raises(RunError, match="zzz: has sequences 10, "):
        load_runs(results)
    assert not (results / "comparison.md").exists()


def test_a_bug_in_a_report_is_not_reported_as_a_damaged_file(results, monkeypatch):
    def bug(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(report, "_compute", bug)
    monkeypatch.setattr(comparison, "_tables", bug)
    with pytest.raises(KeyError, match="a bug"):
        write_report(results / "untrained")
    with pytest.raises(KeyError, match="a bug"):
        write_comparison(results)


def test_a_cell_may_contain_the_separator_of_cells():
    blocks = Blocks()
    blocks.table("a table", ["a|b", "c"], [["1|2", "3"]])
    assert to_markdown(blocks, Path()).splitlines()[2:] == ["| a\\|b | c |", "| --- | --- |", "| 1\\|2 | 3 |"]


def test_figures_leave_the_caller_s_settings_alone(tmp_path):
    code = """if True:
        import sys, matplotlib
        from pathlib import Path
        before = dict(matplotlib.rcParams)
        from experiments.report import figures
        figures.training_loss([1.0, 0.5], Path(sys.argv[1]))
        assert dict(matplotlib.rcParams) == before"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "loss.png")], cwd=RESULTS.parent, check=True)
    assert (tmp_path / "loss.png").stat().st_size > 5000


@pytest.fixture
def drawn(monkeypatch):
    """The figures, in place of files."""
    found = []
    monkeypatch.setattr(figures, "_write", lambda figure, path: found.append(figure))
    return found


def test_an_error_of_0_is_left_out_of_a_logarithmic_axis(drawn):
    figures.against_flops({"exact": (1.0, 0.0), "near": (2.0, 0.1)}, {"level": 0.2}, Path("errors.png"))
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["near"]


def test_names_in_a_figure_do_not_cover_each_other_and_stay_inside(drawn):
    points = {f"one of twenty {i}": (1e10 * (1 + i / 1000), 0.1 * (1 + i / 100)) for i in range(20)}
    ends = {"first": (1e8, 0.5), "last": (1e13, 0.01)}
    figures.against_flops(points | ends, {"level": 0.3}, Path("errors.png"))
    axes = drawn[0].axes[0]
    names = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert {"first", "last", "one of twenty 0"} <= set(names)
    assert 4 < len(names) < 22
    boxes = list(names.values())
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.p0, box.p1))


def test_a_folder_without_runs_is_refused_without_torch(tmp_path):
    code = "import sys; from experiments import comparison; print(comparison.main()); assert 'torch' not in sys.modules"
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=RESULTS.parent, check=True
    )
    assert process.stdout == "2\n"
    assert "holds no run folders" in process.stderr
