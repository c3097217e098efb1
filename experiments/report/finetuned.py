"""The page of a finished fine-tuning on a user's series, from the files of its folder; no model is loaded.

M held-out forecasts, h forecast steps, D variables.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.forecasting.scores import paired
from experiments.report import figures
from experiments.report.words import bracket, counted, factor, number, percent
from experiments.storage.files import RunError
from experiments.storage.records import Interval, Matrix, Positive, Vector, read, read_columns, read_lines
from experiments.study.records import read_losses

METHODS = {"before": "before the fine-tuning", "after": "after the fine-tuning"}


@dataclass(frozen=True)
class Errors:
    """The errors of a method on the held-out forecasts; see `backtest.scores`."""

    rmse: float
    mae: Vector  # (D)
    each: list[float]  # of M forecasts
    over: str  # what the interval is over: "series" or, where they are few, "forecasts"
    interval: Interval | None = None


@dataclass(frozen=True)
class Metrics:
    """metrics.json of a fine-tuning."""

    split: str
    horizon: int
    series: list[int]  # the number of each forecast's series
    groups: list[int]  # the same, or that of its dates, where series have the same
    samples: int
    steps: Positive
    best_step: int
    held_out_before: float
    held_out_after: float
    spent: int
    budget: int
    errors: dict[str, Errors]
    unit: str  # of the held-out loss
    shares: str = ""  # what the forecasts are made of, in words; "": of the model alone
    coverage_80: float | None = None

    def __post_init__(self):
        if not self.errors.keys() > METHODS.keys():
            raise ValueError(f"errors are of {', '.join(self.errors)}, expected 'before', 'after' and a baseline")
        for name, error in self.errors.items():
            if not 0 < len(self.series) == len(error.each):
                expected = len(self.series) or "at least one"
                raise ValueError(f"{name} has errors of {len(error.each)} forecasts, expected {expected}")


@dataclass(frozen=True)
class Line:
    """A line of forecasts.jsonl: a held-out forecast in the units of the data."""

    context: Matrix
    truth: Matrix  # (h, D)
    after: Matrix
    low: Matrix | None = None
    high: Matrix | None = None


@dataclass(frozen=True)
class Identity:
    """What the page shows of the settings."""

    variables: list[str]


@dataclass(frozen=True)
class Plan:
    """plan.json of a fine-tuning."""

    identity: Identity
    command: str
    title: str
    model: str


def page(folder: Path) -> dict[str, Any]:
    """What `write_pages` takes. Raises RunError for a fine-tuning that is not finished, or damaged."""
    plan = read(folder / "plan.json", Plan)
    if not (folder / "metrics.json").exists():
        raise RunError(f"{folder}: the fine-tuning is not finished; its command continues it: {plan.command}")
    metrics, lines = read(folder / "metrics.json", Metrics), read_lines(folder / "forecasts.jsonl", Line)
    variables = plan.identity.variables
    widths = {len(one.mae) for one in metrics.errors.values()} | {line.truth.shape[1] for line in lines}
    if widths != {len(variables)} or len(lines) != len(metrics.series):
        raise RunError(f"{folder}: its files do not agree on the variables or on the number of forecasts")
    rows = {}
    for name, error in sorted(metrics.errors.items(), key=lambda named: named[1].rmse):
        absolute = {f"MAE, {variable}": mae for variable, mae in zip(variables, error.mae, strict=True)}
        rows[METHODS.get(name, name)] = {"RMSE": error.rmse, "interval": error.interval} | absolute
    drawn = []
    for row in sorted({0, len(lines) // 2, len(lines) - 1}):
        one = lines[row]
        band = None if one.low is None or one.high is None else np.stack([one.low, one.high])
        drawn.append(figures.Fan(f"forecast {row + 1}", one.context, one.after, one.truth, band))
    return {
        "title": f"Run {folder.resolve().name}: a fine-tuning on {plan.title}",
        "verdict": verdict(metrics),
        "plan": plan,
        "metrics": metrics,
        "lines": lines,
        "rows": rows,
        "drawn": drawn,
        "losses": read_losses(folder / "losses.csv", metrics.steps),
        "checks": read_columns(folder / "held_out.csv", "steps", "loss"),
    }


def verdict(metrics: Metrics) -> str:
    """The result in words."""
    after, before = metrics.errors["after"], metrics.errors["before"]
    others = {name: error for name, error in metrics.errors.items() if name not in METHODS}
    name, best = min(others.items(), key=lambda named: named[1].rmse)
    change = 1 - after.rmse / before.rmse if before.rmse else 0.0
    text = f"The fine-tuning made the error {percent(abs(change), 0)} {'smaller' if change > 0 else 'larger'}. "
    if abs(change) < 0.005:
        text = "The fine-tuning did not change the error. "
    compared = "smaller than" if after.rmse < best.rmse else "larger than"
    if number(after.rmse) == number(best.rmse):
        compared = "as large as"
    text += (
        f"It is {compared} that of the best baseline, {name}: "
        f"{number(after.rmse)} and {number(best.rmse)} standard deviations."
    )
    # these errors are in the square of the variables' standard deviations, where no error is too small to count
    groups = {"series": metrics.series, "dates": metrics.groups}.get(after.over)
    pair = paired(after.each, best.each, floor=0, series=groups)
    assert pair is not None  # there is at least one forecast
    interval, ratio = pair["interval"], pair["ratio"]
    if interval is None or interval[0] <= 0 <= interval[1]:
        text += f" With {counted(len(metrics.series), 'held-out forecast')}, that difference may be chance."
    if ratio is not None and (ratio < 1) != (pair["difference"] < 0):
        text += (
            f" In the geometric mean, where all forecasts count alike, it is the other way round: the squared error is "
            f"{factor(ratio)} times {bracket(pair['ratio_interval'], factor)} that of the baseline. A few large errors "
            "decide the comparison above."
        )
    return text
