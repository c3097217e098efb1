"""The contents of the tables and figures of a run.

A table has rows by name, whose values `table` finds by their paths. A function with a `path` draws one file.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.forecasting.scores import BAND, QUANTILES, ROUNDING_MSE, paired
from experiments.report import figures, published
from experiments.report.results import SPLITS, Result, Run, methods_of
from experiments.report.words import NO_VALUE, bracket, cell, duration, number, percent
from experiments.study.plans import HORIZON
from experiments.study.records import Errors, Metrics, Scores
from experiments.training.settings import Training

Rows = Mapping[str, Any]
Columns = Mapping[str, str | tuple[str, Callable[[Any], str]]]  # by title: the path of the value, and what writes it

PARTS = {"all": "all.mse", "interval": "all.mse_interval", "median": "all.mse_median", "first ten": "first.mse"}
MSE = {f"{split}, {title}": f"{split}.{path}" for split, (title, path) in product(SPLITS[::-1], PARTS.items())}
SAMPLES = {
    "samples": "samples",
    "CRPS": "crps",
    "interval": "crps_interval",
    "50 % interval": ("coverage_50", percent),
    "80 % interval": ("coverage_80", percent),
}


def table(first: str, rows: Rows, columns: Columns) -> list[list[str]]:
    """The cells of a table, header first, with the names of the rows under `first`.

    Columns that have no value in any row are left out.
    """
    cells = [[first, *columns]]
    for name, row in rows.items():
        cells.append([name])
        for column in columns.values():
            path, write = (column, cell) if isinstance(column, str) else column
            value = _at(row, path)
            cells[-1].append(NO_VALUE if value is None else write(value))
    kept = [i for i, column in enumerate(zip(*cells, strict=True)) if i == 0 or {*column[1:]} != {NO_VALUE}]
    return [[row[i] for i in kept] for row in cells]


def _at(value: Any, path: str) -> Any:
    """The value at a path such as `test.all.mse`; None where a part of it is missing."""
    for name in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list | tuple | np.ndarray):
            value = dict(enumerate(value)).get(int(name))
        else:
            value = getattr(value, name, None)
    return value


def published_mse() -> Rows:
    """What the study published, for the columns MSE."""
    parts = {"val": published.VALIDATION, "test": published.TEST}
    found: dict[str, dict] = {f"published: {name}": {} for name in published.VALIDATION}
    for split, part in parts.items():
        for name, (mse, *_) in part.items():
            found[f"published: {name}"][split] = {"first": {"mse": mse}}
    return found


def ranked(run: Run) -> Rows:
    """The scores of all methods: the smallest test error first, then those of validation alone."""
    methods = run.baselines | methods_of(run.experiments)

    def order(name: str) -> list[float]:
        errors = (_at(methods[name], f"{split}.all.mse_filled") for split in SPLITS[::-1])
        return [np.inf if error is None else error for error in errors]

    return {name: methods[name] for name in sorted(methods, key=order)}


def by_split(run: Run, incomplete: bool = False) -> dict[str, Metrics]:
    """The metrics of each experiment and split; incomplete: only where the model left out values or tokens."""
    return {
        f"{name}, {split}": metrics
        for name, experiment in run.experiments.items()
        for split, metrics in experiment.metrics.items()
        if metrics.all.malformed_values or metrics.all.unscored_tokens or not incomplete
    }


def long_errors(run: Run) -> dict[str, Errors]:
    """The test errors of the baselines and the judged experiments over the long horizon, where they are known."""
    scores = run.baselines | {name: experiment.metrics for name, experiment in run.judged.items()}
    long = {name: by_split["test"].long or by_split["test"].all for name, by_split in scores.items()}
    return {name: errors for name, errors in long.items() if errors.mse_by_horizon}


def samples(run: Run) -> Rows:
    """The scores of sampled paths, and the absolute errors of the baselines; no rows if there are no samples."""
    judged = {name: metrics.probabilistic for name, metrics in by_split(run).items() if metrics.probabilistic}
    points = {f"{name}, test": each["test"].all.mae for name, each in run.baselines.items()}
    return judged and judged | {name: {"samples": "point", "crps": error} for name, error in points.items()}


def against_others(run: Run) -> dict[str, Rows]:
    """For each method of the experiment that is best on validation: its comparison with all others, by sequence."""
    scores = run.baselines | methods_of(run.judged)
    each = {name: by_split["test"].mse_each or [] for name, by_split in scores.items() if "test" in by_split}
    last = dict([*run.judged.items()][-1:])
    found: dict[str, Rows] = {}
    for ours in (name for name in methods_of(last) if name in each):
        pairs = {name: paired(each[ours], theirs, ROUNDING_MSE) for name, theirs in each.items() if name != ours}
        found[ours] = {name: pair for name, pair in pairs.items() if pair}
    return found


def against_columns() -> Columns:
    """The columns of `against_others`."""
    signed, relative = "{:+.4f}".format, "{:.3g}".format
    return {
        "difference of MSE": ("difference", signed),
        "its interval, often too narrow": ("interval", lambda interval: bracket(interval, signed)),
        "ratio of geometric mean MSE": ("ratio", relative),
        "its 95 % interval": ("ratio_interval", lambda interval: bracket(interval, relative)),
        "sequences where it is better": ("better", lambda share: percent(share, 0)),
    }


def cost_columns(conventions: Mapping, flops: Callable, seconds: Callable = duration) -> Columns:
    """The columns of steps, FLOPs in each convention, and times; `flops` and `seconds` write them."""
    times = {title: (f"seconds.{title}", seconds) for title in ("training", "evaluation")}
    counts = {name: (f"flops.{name}", flops) for name in conventions}
    return {"steps": "training.steps"} | counts | times | {"published by the study": ("published", flops)}


def compute(run: Run) -> Rows:
    """The costs of a run, and its sums by section with those that the study published for the same experiments."""
    rows: dict[str, Any] = dict(run.experiments)
    texts = [one for one in run.trained().values() if one.section != "numbers"]
    sections = {experiment.section for experiment in run.plan.identity.experiments}
    for section, (title, theirs) in published.SECTIONS.items():
        if section in sections or section == "all":
            parts = [one for one in texts if section in (one.section, "all")]
            sums = {name: sum(each.flops[name] for each in parts) for name in run.plan.conventions}
            is_comparable = section in sections or sections >= published.SECTIONS.keys() - {"all"}
            rows[f"{title}: sum"] = {"flops": sums, "published": 10**theirs if is_comparable else None}
    return rows


def compared(run: Run, names: list[str]) -> Rows:
    """Our scores next to the published ones: on validation, and where the study published them on the test set."""
    rows: dict[str, dict] = {}
    for name in names:
        found = run.experiments[name].metrics if name in run.experiments else {}
        rows[name] = {"ours": found.get("val"), "published": published.VALIDATION.get(name)}
        if name in published.TEST:
            rows[f"{name}, test"] = {"ours": found.get("test"), "published": published.TEST[name]}
    return rows


def worst(run: Run, name: str, count: int) -> list[int]:
    """The test sequences with the largest errors of an experiment, the largest first."""
    known = {row: line.mse for row, line in enumerate(run.experiments[name].forecasts["test"]) if line.mse is not None}
    return sorted(known, key=lambda row: known[row], reverse=True)[:count]


def best(trained: Mapping[str, Result]) -> str:
    """The training with the smallest validation error."""
    return min(trained, key=lambda name: trained[name].metrics["val"].all.mse_filled)


def settings(training: Training) -> str:
    """The settings of a training, without its seed and those that are not set."""
    hidden = (None, "text")  # what is not set, and what most trainings read
    shown = {key: value for key, value in vars(training).items() if key != "seed" and value not in hidden}
    return ", ".join(f"{key} {_setting(value)}" for key, value in shown.items())


def _setting(value: Any) -> str:
    return " + ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def losses(trained: Mapping[str, Result], best: str | None = None, *, path: Path) -> None:
    """Draw the losses of trainings, as `figures.losses`."""
    figures.losses({name: experiment.losses for name, experiment in trained.items()}, best, path=path)


def by_flops(
    baselines: Mapping[str, Mapping[str, Scores]], experiments: Mapping[str, Result], split: str, part: str,
    convention: str, with_published: bool = False, *, path: Path,
) -> None:  # fmt: skip
    """Draw the errors on a part of a split ("first" or "all") against the FLOPs of each training, as
    `figures.against_flops`; baselines and untrained models are levels.
    """
    levels = {name: getattr(scores[split], part).mse for name, scores in baselines.items()}
    points = {}
    for each, experiment in experiments.items():
        for name, scores in methods_of({each: experiment}).items():
            errors = _at(scores, f"{split}.{part}")
            if errors and experiment.training:
                # an interval from ten sequences contains the mean of all in about half of the cases
                known = part == "all" and not errors.malformed_values
                interval = (errors.mse_interval or ()) if known else ()
                points[name] = (experiment.flops[convention], errors.mse_filled, *interval)
            elif errors:
                levels[name] = errors.mse_filled
    theirs = {name: (10**flops, mse) for name, (mse, _, flops) in published.VALIDATION.items() if flops}
    figures.against_flops(points, levels, theirs if with_published else {}, convention=convention, path=path)


def bands(run: Run, name: str, split: str, rows: Sequence[int]) -> np.ndarray | None:
    """The bounds (N, 2, h, 2) of the central 80 % of the samples of N sequences; None if one of them has none."""
    quantiles = [run.experiments[name].forecasts[split][row].quantiles or [None] * len(QUANTILES) for row in rows]
    bounds = [[each[QUANTILES.index(level)] for level in BAND] for each in quantiles]
    return None if any(bound is None for pair in bounds for bound in pair) else np.array(bounds)


def sequences(run: Run, name: str, split: str, rows: Sequence[int], steps: int | None = None, *, path: Path) -> None:
    """Draw sequences of a split, with the central 80 % of the samples if there are some; steps: None draws all."""
    lines = [run.experiments[name].forecasts[split][row] for row in rows]
    shown = [run.contexts[split][row] for row in rows]
    figures.fan(
        ["prey", "predator"],
        [one.context for one in shown],
        [line.forecast[:steps] for line in lines],
        bands(run, name, split, rows),
        path,
        [f"sequence {row}, MSE {number(line.mse)}" for row, line in zip(rows, lines, strict=True)],
        [one.truth[:steps] for one in shown],
        judged=HORIZON,
    )


def errors(run: Run, path: Path) -> None:
    """Draw the test error of every baseline and every method of a judged experiment."""
    ours = methods_of(run.judged)
    tests = {name: by_split["test"].all for name, by_split in (run.baselines | ours).items() if "test" in by_split}
    figures.errors({name: (one.mse, one.mse_interval) for name, one in tests.items() if one.mse}, set(ours), path)


def by_horizon(run: Run, path: Path) -> None:
    """Draw the test error at each forecast step; baselines are grey."""
    lines = {}
    for name, errors in long_errors(run).items():
        curve = np.array(errors.mse_by_horizon, dtype=float)
        lines[name] = (1 + np.arange(len(curve)), curve, figures.OTHER if name in run.baselines else {"linestyle": "-"})
    figures.curves(lines, "forecast step", "MSE (scaled units)", log=True, path=path)
