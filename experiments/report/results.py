"""Reads a run folder from its files and formats its numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.storage.files import RunError, parse_json_lines, read_text
from experiments.storage.records import build, read, read_lines
from experiments.study.records import (
    Context,
    Debit,
    Example,
    ForecastLine,
    Metrics,
    PlanRecord,
    Scores,
    Seconds,
    Settings,
    Status,
    read_losses,
    read_metrics,
    read_settings,
)
from experiments.training.settings import Training

NO_VALUE = "-"  # a cell without a value
SPLITS = ("val", "test")
MSE_COLUMNS = ["method", "val, first ten", "val, all", "interval", "median", "test, first ten", "test, all",
               "interval", "median"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result(Settings):
    """A finished experiment."""

    metrics: dict[str, Metrics]  # by split; "val" is always there
    seconds: Seconds
    forecasts: dict[str, list[ForecastLine]]  # by split, a line for each sequence


@dataclass(frozen=True, kw_only=True)
class TrainedResult(Result):
    """A finished experiment with a training."""

    training: Training
    losses: list[float]  # of each step


@dataclass
class Run:
    """The contents of a run folder."""

    folder: Path
    plan: PlanRecord
    example: Example
    baselines: dict[str, dict[str, Scores]]  # by name and split
    contexts: dict[str, list[Context]]  # by split
    spent: int  # FLOPs, from the ledger
    status: Status | None  # None: the run was killed before it wrote one
    experiments: dict[str, Result] = field(default_factory=dict)  # the finished ones, in the order of the plan

    @property
    def unfinished(self) -> list[str]:
        """Experiments of the plan without a result."""
        return [e.name for e in self.plan.identity.experiments if e.name not in self.experiments]

    @property
    def trained(self) -> dict[str, TrainedResult]:
        """The finished experiments with a training."""
        return {name: result for name, result in self.experiments.items() if isinstance(result, TrainedResult)}


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises RunError when a file of it is missing or damaged."""
    status = folder / "status.json"
    run = Run(
        folder,
        read(folder / "plan.json", PlanRecord),
        read(folder / "example.json", Example),
        read(folder / "baselines.json", dict[str, dict[str, Scores]]),
        {split: read_lines(folder / f"{split}.jsonl", Context) for split in SPLITS},
        _spent(folder / "ledger.jsonl"),
        read(status, Status) if status.exists() else None,
    )
    counts = {split: len(lines) for split, lines in run.contexts.items()}
    for split, count in counts.items():
        if not count:
            raise RunError(f"{folder / split}.jsonl: is empty, expected a line for each sequence")
    for name, by_split in run.baselines.items():
        scored = {split: len(scores.mse_each or ()) for split, scores in by_split.items()}
        if scored != counts:
            raise RunError(f"{folder / 'baselines.json'}, {name}: has mse_each of {scored}, expected {counts}")
    for experiment in run.plan.identity.experiments:
        path = folder / "experiments" / Path(experiment.name).name
        if (path / "metrics.json").exists():
            run.experiments[experiment.name] = _read_result(path, counts, run.plan.conventions)
    return run


def _spent(ledger: Path) -> int:
    """The sum of the FLOPs in a ledger; an incomplete last line, which a kill leaves, does not count."""
    whole = read_text(ledger).rpartition("\n")[0] if ledger.exists() else ""
    lines = [build(Debit, line, f"{ledger}, line {i}") for i, line in enumerate(parse_json_lines(ledger, whole), 1)]
    return sum({(line.experiment, line.step): line.flops for line in lines}.values())


def _read_result(path: Path, counts: dict[str, int], conventions: dict[str, str]) -> Result:
    settings, metrics = read_settings(path), read_metrics(path)
    if settings.training and not settings.flops.keys() >= conventions.keys():
        raise RunError(f"{path / 'settings.json'}: has FLOPs in {list(settings.flops)}, expected {list(conventions)}")
    forecasts = {split: read_lines(path / f"forecasts.{split}.jsonl", ForecastLine) for split in metrics}
    for split, lines in forecasts.items():
        means = metrics[split].mean_of_samples
        if {len(lines), len(means.mse_each or ()) if means else len(lines)} != {counts[split]}:
            raise RunError(f"{path}: has forecasts of {len(lines)} {split} sequences, expected {counts[split]}")
    seconds = read(path / "seconds.json", Seconds)
    result = Result(**vars(settings), metrics=metrics, seconds=seconds, forecasts=forecasts)
    if settings.training is None:
        return result
    return TrainedResult(**vars(result), losses=read_losses(path / "losses.csv", settings.training.steps))


def methods_of(name: str, result: Result) -> dict[str, dict[str, Scores]]:
    """Scores by method and split: the forecast of an experiment and, if it drew samples, their mean."""
    methods: dict[str, dict[str, Scores]] = {name: dict(result.metrics)}
    for split, metrics in result.metrics.items():
        if metrics.mean_of_samples and metrics.probabilistic:
            drawn = methods.setdefault(f"{name}, mean of {metrics.probabilistic.samples} samples", {})
            drawn[split] = metrics.mean_of_samples
    return methods


def number(value: float | None) -> str:
    """The value with four decimals, or with two digits and an exponent if it is too small for that."""
    if value is None:
        return NO_VALUE
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def log10(flops: int | float) -> str:
    """FLOPs as 10^x, as the study writes them."""
    return f"10^{math.log10(flops):.3f}" if flops else "0"


def duration(seconds: float) -> str:
    """A time as people say it: `47 s`, `12 min`, `1 h 59 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def bracket(interval: tuple[float, float] | list[float] | None, write: Callable[[float], str] = number) -> str:
    """An interval as a table cell."""
    return f"[{write(interval[0])}, {write(interval[1])}]" if interval else NO_VALUE


def mse_row(name: str, by_split: dict[str, Scores]) -> list[str]:
    """The cells of a method under MSE_COLUMNS, from its scores by split."""
    cells = [name]
    for split in SPLITS:
        if scores := by_split.get(split):
            first, all_ = scores.first, scores.all
            cells += [number(first.mse), number(all_.mse), bracket(all_.mse_interval), number(all_.mse_median)]
        else:
            cells += [NO_VALUE] * 4
    return cells
