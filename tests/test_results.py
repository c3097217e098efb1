"""The shipped runs: metrics are computed again from forecasts, tables from metrics, and pages are drawn again."""

import json
import re
import shutil
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from conftest import REAL
from experiments.forecasting.adapter import NUMBERS, checkpoint_hash
from experiments.forecasting.baselines import BASELINES
from experiments.forecasting.scores import SPLIT_PARTS, mean_interval, method_errors, paired, probabilistic
from experiments.report import figures
from experiments.report.build import write_comparison, write_report
from experiments.report.published import TEST, VALIDATION
from experiments.report.results import Run, load_run, methods_of
from experiments.report.words import bracket, percent
from experiments.study import plans
from experiments.study.plans import HORIZON
from experiments.training.settings import Training
from experiments.training.text_tuning import step_flops
from tests import small_plan

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FOLDERS = sorted(plan.parent for plan in RESULTS.glob("*/plan.json"))
EXPERIMENTS = sorted(path.parent for path in RESULTS.glob("*/experiments/*/metrics.json"))
README, STUDY = (ROOT / "README.md").read_text(), (ROOT / "docs" / "study.md").read_text()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@cache
def contexts(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The contexts (N, 70, 2) and the truth (N, h, 2) of a run."""
    held = read_lines(folder / f"{split}.jsonl")
    return np.array([line["context"] for line in held]), np.array([line["truth"] for line in held])


def assert_same(kept: object, found: object, rel: float, place: str = "") -> None:
    """That two results of scores agree, number by number."""
    if isinstance(found, dict):
        for name, value in found.items():
            assert_same(kept[name], value, rel, f"{place} {name}")
    else:
        kept, found = np.array(kept, float), np.array(found, float)
        kept = np.where(found >= 0, np.maximum(kept, 0), kept)  # some runs are older than the intervals that end at 0
        assert kept == pytest.approx(found, rel=rel, abs=2e-7, nan_ok=True), place


def assert_metrics_of_forecasts(path: Path, horizon: int) -> None:
    """That the metrics of an experiment are those of its forecasts, to the digits that these are written with."""
    folder = path.parents[1]
    for split, kept in json.loads((path / "metrics.json").read_text()).items():
        held = read_lines(path / f"forecasts.{split}.jsonl")
        forecast = np.array([line["forecast"] for line in held], float)
        context, truth = (array[: len(held)] for array in contexts(folder, split))
        fallback, near = context.mean(axis=1), truth[:, :horizon]
        found = method_errors(forecast, truth, fallback, horizon)
        each = found.pop("mse_each")
        assert_same([line["mse"] for line in held], each, 0.05, path.name)
        if "probabilistic" in kept:
            samples = np.array([line["samples"] for line in read_lines(path / f"samples.{split}.jsonl")])
            found["probabilistic"] = probabilistic(samples, near)
            found["mean_of_samples"] = method_errors(samples.mean(axis=1), near, fallback, horizon)
        assert_same(kept, found, 0.005, f"{path.name} {split}")
        if "exact" in kept:
            assert_same(kept["exact"], of_each(kept["exact"]["mse_each"]), 0.001, f"{path.name} {split} exact")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_metrics_are_those_of_the_forecasts(path):
    assert_metrics_of_forecasts(path, HORIZON)


def of_each(mse_each: list[float]) -> dict:
    """What the errors of single sequences say about the first ten, and about all."""
    parts = {part: np.array(mse_each[rows]) for part, rows in SPLIT_PARTS.items()}
    return {
        part: {"mse": one.mean(), "mse_median": np.median(one), "mse_interval": np.maximum(mean_interval(one), 0)}
        for part, one in parts.items()
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_errors_of_baselines_are_those_of_the_contexts(folder):
    for name, by_split in json.loads((folder / "baselines.json").read_text()).items():
        for split, kept in by_split.items():
            assert_same(kept, of_each(kept["mse_each"]), 0.001, f"{name} {split}")
            context, truth = contexts(folder, split)
            if baseline := BASELINES.get(name.partition("(")[0]):  # the GRU would have to be trained
                rounded = context.round(2)  # of four decimals: a few values are rounded otherwise
                forecast = np.stack([baseline(one, HORIZON) for one in rounded])
                found = ((forecast - truth[:, :HORIZON]) ** 2).mean()
                assert kept["all"]["mse"] == pytest.approx(found, rel=0.01), f"{name} {split}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_command_of_a_run_continues_it(folder):
    identity = json.loads((folder / "plan.json").read_text())["identity"]
    plan = plans.PLANS[identity["plan"]](identity["seed"])
    assert identity["experiments"] == json.loads(json.dumps([asdict(one) for one in plan.experiments]))
    numbers = checkpoint_hash(NUMBERS) if len(plan.texts) < len(plan.experiments) else None
    assert identity.get("numbers_sha256") == numbers


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {folder.name: load_run(folder) for folder in FOLDERS}


@pytest.fixture(scope="module")
def methods(runs) -> dict[str, list[float]]:
    """By name: FLOPs, the errors of ten validation and ten test sequences, of all of test, its interval and median.

    Names of the default run begin with `quick: `, because its data are rounded otherwise.

    Of three seeds: means, and in place of the interval the range of the errors of all of test.
    """
    found = {}
    for run in runs.values():
        for name, scores in (run.baselines | methods_of(run.judged)).items():
            experiment, test = run.experiments.get(name.partition(",")[0]), scores["test"].all
            cost = experiment.flops.get("study", 0) if experiment else None
            val = scores["val"].first.mse if "val" in scores else None  # not all samples are drawn of both
            errors = (val, scores["test"].first.mse, test.mse, *test.mse_interval, test.mse_median)
            found["quick: " * (run.folder.name == "quick") + name] = [cost, *errors]
    for method in [name.replace("seed0", "seed{}") for name in found if "seed0" in name]:
        seeds = np.array([found[method.format(seed)] for seed in range(3)])
        found[method] = [*seeds.mean(axis=0)[:4], seeds[:, 3].min(), seeds[:, 3].max(), seeds[:, 6].mean()]
    return found


@cache
def study_flops() -> dict[str, float]:
    """The FLOPs of the report's trainings with the model's real sizes, and their sums by section."""
    best, costs = Training(8, 1e-4, 768, 1), {}
    for one in plans.study(seed=0).experiments:
        if one.training:
            cost = one.training.steps * step_flops(REAL, plans.fill(one.training, best), None, "study")
            costs |= {one.name: cost, one.section: costs.get(one.section, 0) + cost}
    return costs | {"all": sum(cost for name, cost in costs.items() if name.startswith("6."))}


def row(page: str, begins: str) -> list[str]:
    """The numbers in the row of a table, after its first cell, or after all of `begins`."""
    (found,) = re.findall(rf"^\| {re.escape(begins)}(.*)", page, re.MULTILINE)
    return re.findall(r"\d[\d.]*(?:e\d+)?", found if "|" in begins else found.partition("|")[2])


def assert_shown(written: list[str], values: list[float | None]) -> None:
    """That numbers are written with the digits of these values; None: no file has the value."""
    expected = []
    for text, value in zip(written, values, strict=True):
        number, _, exponent = text.partition("e")
        digits = len(number.partition(".")[2])
        exact = f"{value:.{digits}{'e' if exponent else 'f'}}" if value is not None else text
        expected.append(exact.replace("e+", "e"))
    assert written == expected


@pytest.mark.parametrize(("begins", "method"), [
    ("*simple methods:* persistence", "persistence"),
    ("seasonal naive", "seasonal naive"),
    ("AR(20)", "AR(20)"),
    ("VAR(18)", "VAR(18)"),
    ("**GRU", "GRU trained on the 700"),
    ("*ours, 0.5B, text:* untrained", "untrained"),
    ("trial, the report's settings", "trial"),
    ("`final` of plan `overnight`", "final"),
    ("`frontier`, greedy", "frontier"),
    ("`frontier`, mean of 20", "frontier, mean of 20 samples"),
    ("*ours, `tiny`, text:* untrained", "quick: untrained"),
    ("`final` of plan `quick`", "quick: final"),
    ("all weights, one seed", "whole-5e13"),
    ("the same, exact contexts | 5.0e13 |", "whole-5e13, exact contexts"),
    ("*ours, `numbers`", "numbers-1e12-seed{}"),
    ("the same, exact contexts | 1.0e12", "numbers-1e12-seed{}, exact contexts"),
    ("ten times as long", "numbers-1e13-seed{}"),
    ("the same, exact contexts | 1.0e13", "numbers-1e13-seed{}, exact contexts"),
])  # fmt: skip
def test_a_row_of_the_study_s_table_is_that_of_the_files(methods, begins, method):
    written = row(STUDY, begins)
    assert_shown(written, methods[method][-len(written) :])  # the cost is not in every row


def test_rows_of_the_report_have_its_errors_and_the_costs_of_the_plan():
    flops, grid = study_flops(), [mse for name, (mse, *_) in VALIDATION.items() if name.startswith("grid")]
    for begins in ("6.2 trial", "6.3 grid", "6.4 context", "6.5 final"):
        (written,) = (number for number in row(STUDY, begins) if "e1" in number)
        assert_shown([written], [flops[begins[:3]]])
    assert_shown(row(STUDY, "*the report:* untrained"), [VALIDATION["untrained"][0]])
    assert_shown(row(STUDY, "trial |"), [flops["trial"], VALIDATION["trial"][0]])
    assert_shown(row(STUDY, "best and worst of the grid"), [flops["grid-r8-lr0.0001"], min(grid), max(grid)])
    assert_shown(row(STUDY, "final |"), [flops["final"], VALIDATION["final"][0], TEST["final"][0]])
    assert f"**{flops['all']:.3e}**".replace("e+", "e") in STUDY
    assert f"cost {flops['all']:.3e} FLOPs, more than".replace("e+", "e") in " ".join(README.split())


def test_the_table_of_the_readme_is_that_of_the_files(methods):
    assert_shown(row(README, "text: a student's report"), [study_flops()["final"], TEST["final"][0]])
    for begins, name in (
        ("GRU", "GRU trained on the 700"),
        ("`numbers`, 1.2 M", "numbers-1e12-seed0"),
        ("`numbers`, ten", "numbers-1e13-seed0"),
        ("text: Qwen2.5-Coder", "frontier, mean of 20 samples"),
        ("text: `tiny`", "quick: final"),
        ("VAR", "VAR(18)"),
    ):
        cost, _, ten, *test, _ = methods[name]
        written = row(README, begins)
        assert_shown(written, [cost, *test, ten][-len(written) :])


def test_what_the_study_says_below_its_table_is_that_of_the_files(runs, methods):
    network, text = "GRU trained on the 700", runs["frontier"].experiments["frontier"].metrics["test"]
    others = {name: by_split["test"] for name, by_split in runs["frontier"].baselines.items()}
    pairs = {name: paired(text.mean_of_samples.mse_each, one.mse_each) for name, one in others.items()}
    var, gru, drawn = pairs["VAR(18)"], pairs[network], text.probabilistic
    values = runs["numbers"].baselines | methods_of(runs["numbers"].experiments)

    def between(name: str, other: str) -> dict:
        return paired(*(values[one]["test"].mse_each for one in (name, other)))

    def ratio(pair: dict, digits: int = 2) -> str:
        return f"{pair['ratio']:.{digits}f} {bracket(pair['ratio_interval'], f'{{:.{digits}f}}'.format)}"

    lora = {}
    for other, flops in product(("whole", "scratch"), ("1e12", "1e13")):
        ratios = [between(f"numbers-{flops}-seed{seed}", f"{other}-{flops}")["ratio"] for seed in range(3)]
        lora[f"{other}-{flops}"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    seeds = [between(f"numbers-1e13-seed{seed}", network) for seed in range(3)]
    whole = between("whole-5e13", network)
    overnight = {name: one.metrics["val"].first.mse for name, one in runs["overnight"].experiments.items()}
    grid = sorted((mse, name) for name, mse in overnight.items() if name.startswith("grid"))
    assert (grid[0][1], grid[-1][1]) == ("grid-r8-lr0.0005", "grid-r2-lr0.0001")
    cost = runs["overnight"].experiments[grid[0][1]].flops["study"]
    assert_shown(row(STUDY, "the best and the worst"), [cost, grid[0][0], grid[-1][0]])
    validation = [values[f"numbers-1e13-seed{seed}"]["val"].all.mse for seed in range(3)]
    exact = {name.removesuffix(", exact contexts"): values[3] for name, values in methods.items() if "exact" in name}
    said = [
        f"has {methods['final'][2]:.4f} on the ten test series where the report has {TEST['final'][0]:.4f}",
        f"the trial has {overnight['trial']:.4f}, the grid {grid[0][0]:.4f} (rank 8, 5e-4) to {grid[-1][0]:.4f} (rank "
        f"2, 1e-4), contexts of 128, 512 and 768 tokens have {overnight['context-128']:.4f}, "
        f"{overnight['context-512']:.4f} and {overnight['context-768']:.4f}.",
        f"text has {ratio(pairs['seasonal naive'])} of seasonal naive's error, {ratio(pairs['AR(20)'])} of AR(20)'s, "
        f"{ratio(var)} of VAR(18)'s",
        f"better than the mean of samples on {percent(1 - var['better'], 0)} of the test series",
        f"error is {ratio(gru, 0).replace(' ', ' times ', 1)} smaller",
        f"better on {percent(1 - gru['better'], 0)} of the series",
        f"weights gives {exact['whole-1e12']:.4f} and {exact['whole-1e13']:.5f}, training the same network from random "
        f"weights {exact['scratch-1e12']:.3f} and {exact['scratch-1e13']:.5f} (",
        f"LoRA has {lora['whole-1e12']} and {lora['whole-1e13']} of the error of all weights, {lora['scratch-1e12']} "
        f"and {lora['scratch-1e13']} of that from random weights",
        f"is {min(one['ratio'] for one in seeds):.2f} to {max(one['ratio'] for one in seeds):.2f} times the GRU's",
        f"on {100 * min(one['better'] for one in seeds):.0f} to {100 * max(one['better'] for one in seeds):.0f} % of",
        f"{ratio(whole)} and {percent(whole['better'], 0)}",
        f"it has {min(validation):.5f} to {max(validation):.5f} for 1e13, the GRU {values[network]['val'].all.mse:.5f}",
        f"hold {percent(drawn.coverage_80, 0)} of the truth, the 50 % intervals {percent(drawn.coverage_50, 0)}",
        f"{drawn.crps:.4f}; VAR(18) {others['VAR(18)'].all.mae:.4f}, GRU {others[network].all.mae:.4f}",
    ]
    assert [one for one in said if one not in " ".join(STUDY.split())] == []


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """The committed runs, without their figures and pages; test_run.py draws figures."""
    small_plan.install(put=monkeypatch.setattr)
    drawn = shutil.ignore_patterns("*.png", "*.md", "*.html")
    return shutil.copytree(RESULTS, tmp_path / "results", ignore=drawn)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_reports_that_come_with_the_project_match_their_files(results, folder):
    page = write_report(results / folder.name)
    markdown = page.with_suffix(".md").read_text()
    assert markdown == (folder / "report.md").read_text()
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


def test_figures_show_every_run(results, methods, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "against_flops", lambda *given: drawn.setdefault(given[-1].stem, given))
    with pytest.warns(UserWarning, match="left out: quick"):
        write_comparison(results)
    points, levels, *_ = drawn["test-all-by-flops"]
    counts = {"frontier": 1, "frontier, mean of 20 samples": 1, "numbers": 6, "whole": 3, "scratch": 2, "final": 1}
    assert {name: len(each) for name, each in points.items()} == counts | {"trial": 1}
    assert len(levels) == 7  # six baselines and the untrained model
    cost, _, _, *test, _ = methods["frontier, mean of 20 samples"]
    assert points["frontier, mean of 20 samples"] == [pytest.approx((cost, *test))]


def test_a_folder_without_runs_is_refused(tmp_path, refused):
    assert "holds no plan.json, and no run folders to compare" in refused("report", tmp_path)
