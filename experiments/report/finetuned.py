"""The results page of a fine-tuning on a user's series, from the files of its folder; no model is loaded.

M held-out forecasts, h forecast steps, D variables.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.forecasting.scores import paired
from experiments.report import figures
from experiments.report.page import Blocks, to_html, to_markdown
from experiments.report.results import NO_VALUE, bracket, number
from experiments.storage.files import RunError, read_text, write_whole
from experiments.storage.records import Interval, Matrix, Vector, read, read_lines
from experiments.study.records import read_losses

FINETUNED = "held_out.csv"  # the folder of a fine-tuning has this file
METHODS = {"before": "before the fine-tuning", "after": "after the fine-tuning"}


@dataclass(frozen=True)
class Errors:
    """The errors of a method on the held-out forecasts; see `backtest.scores`."""

    rmse: float
    mae: Vector  # (D)
    each: Vector  # (M)
    interval: Interval | None = None


@dataclass(frozen=True)
class Metrics:
    """metrics.json of a fine-tuning."""

    split: str
    horizon: int
    context: int
    forecasts: int
    samples: int
    spread: Vector
    steps: int
    best_step: int
    held_out_before: float
    held_out_after: float
    spent: int
    budget: int
    errors: dict[str, Errors]
    coverage_80: float | None = None

    def __post_init__(self):
        if not self.errors.keys() >= METHODS.keys():
            raise ValueError(f"errors are of {', '.join(self.errors)}, expected 'before' and 'after' among them")
        if any(
            len(error.each) != self.forecasts or len(error.mae) != len(self.spread) for error in self.errors.values()
        ):
            raise ValueError(f"expected errors of {self.forecasts} forecasts and {len(self.spread)} variables")


@dataclass(frozen=True)
class Line:
    """A line of forecasts.jsonl: a held-out forecast in the units of the data."""

    context: Matrix
    truth: Matrix  # (h, D)
    before: Matrix
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


def verdict(metrics: Metrics) -> str:
    """The result in words."""
    after, before = metrics.errors["after"], metrics.errors["before"]
    others = {name: error for name, error in metrics.errors.items() if name not in METHODS}
    best = min(others, key=lambda name: others[name].rmse)
    change = 1 - after.rmse / before.rmse if before.rmse else 0.0
    text = f"The fine-tuning made the error {abs(change):.0%} {'smaller' if change > 0 else 'larger'}. "
    if abs(change) < 0.005:
        text = "The fine-tuning did not change the error. "
    pair = paired(after.each.tolist(), others[best].each.tolist())
    assert pair is not None  # there is at least one forecast
    ratio, interval = pair["ratio"], pair["ratio_interval"]
    sure = interval is not None and not interval[0] <= 1 <= interval[1]
    text += (
        f"It is {'smaller' if after.rmse < others[best].rmse else 'larger'} than that of the best baseline, {best}: "
        f"{number(after.rmse)} and {number(others[best].rmse)} standard deviations. "
    )
    if not sure:
        return text + "With so few held-out forecasts, that difference may be chance."
    return text + (
        f"Forecast by forecast, the geometric mean of its squared errors is {ratio:.2g} times "
        f"{bracket(interval, '{:.2g}'.format)} that of the baseline."
    )


def build(folder: Path) -> Blocks:
    """The page of a finished fine-tuning; draws the figures into its folder. Raises RunError for damaged files."""
    plan, metrics = read(folder / "plan.json", Plan), read(folder / "metrics.json", Metrics)
    lines = read_lines(folder / "forecasts.jsonl", Line)
    variables, blocks, drawn = plan.identity.variables, Blocks(), folder / "figures"
    if len(variables) != len(metrics.spread) or any(line.truth.shape[1] != len(variables) for line in lines):
        raise RunError(f"{folder}: its files do not agree on the variables")
    blocks.heading(1, f"Forecasting {plan.title}")
    blocks.verdict(verdict(metrics))
    shown = [lines[i] for i in sorted({0, len(lines) // 2, len(lines) - 1})]
    bands = [np.stack([line.low, line.high]) for line in shown if line.low is not None and line.high is not None]
    figures.fan(
        variables,
        [line.context for line in shown],
        [line.after for line in shown],
        bands if len(bands) == len(shown) else None,
        drawn / "forecasts.png",
        [line.truth for line in shown],
        [f"forecast {i + 1}" for i in range(len(shown))],
    )
    band = ", with the central 80 % of its samples" if bands else ""
    blocks.figure(drawn / "forecasts.png", f"Held-out forecasts after the fine-tuning{band}")
    rows = [
        [METHODS.get(name, name), number(error.rmse), bracket(error.interval), *map(number, error.mae)]
        for name, error in sorted(metrics.errors.items(), key=lambda named: named[1].rmse)
    ]
    blocks.table(
        f"Errors of {metrics.forecasts} held-out forecasts of {metrics.horizon} steps. RMSE is in standard deviations "
        "of each variable, with a 95 % interval; the mean absolute errors are in the units of the data",
        ["method", "RMSE", "95 % interval", *(f"MAE, {name}" for name in variables)],
        rows,
    )
    share = NO_VALUE if metrics.coverage_80 is None else f"{metrics.coverage_80:.0%}"
    blocks.text(
        f"Data: {metrics.split}. The model ({plan.model}) reads {metrics.context} time steps before a forecast. Its "
        f"forecast is the mean of {metrics.samples} sampled paths, whose central 80 % hold {share} of the true values."
        if metrics.samples
        else f"Data: {metrics.split}. The model ({plan.model}) reads {metrics.context} time steps before a forecast."
    )
    blocks.heading(2, "Training")
    blocks.text(
        f"{metrics.spent:.3e} of {metrics.budget:.3e} FLOPs were spent in {metrics.steps} steps. The adapter is that "
        f"of step {metrics.best_step}, which had the smallest held-out loss: {number(metrics.held_out_after)} nats per "
        f"value, {number(metrics.held_out_before)} before the training."
    )
    figures.training_loss(read_losses(folder / "losses.csv", metrics.steps), drawn / "losses.png")
    blocks.figure(drawn / "losses.png", "Loss on the training windows, in nats per token")
    figures.held_out_loss(_checks(folder / "held_out.csv"), drawn / "held-out.png")
    blocks.figure(drawn / "held-out.png", "Loss of the validation forecasts, in nats per value")
    blocks.code(plan.command)
    return blocks


def _checks(path: Path) -> list[tuple[int, float]]:
    """(steps done, loss) of each check. Raises RunError."""
    try:
        return [
            (int(row["steps"]), float(row["nats_per_value"])) for row in csv.DictReader(read_text(path).splitlines())
        ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunError(f"{path}: not a table of held-out losses ({error!r})") from error


def write_page(folder: Path) -> Path:
    """Write figures, report.md and report.html into the folder of a fine-tuning; return the path of report.html."""
    blocks = build(folder)
    markdown, html = to_markdown(blocks, folder), to_html(blocks, blocks[0][1][1])
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", html)
    return folder / "report.html"
