"""What a run folder holds, read back from its files, and how its numbers are written."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.runfolder import holding, read_json, read_json_lines, read_text

NONE = "-"
MSE_COLUMNS = ["method", "val, first ten", "val, all", "interval", "median", "test, first ten", "test, all",
               "interval", "median"]  # fmt: skip


@dataclass
class Run:
    """What a run folder holds."""

    folder: Path
    plan: dict
    example: dict
    baselines: dict
    contexts: dict[str, list[dict]]
    experiments: dict[str, dict] = field(default_factory=dict)  # finished ones, in the order of the plan

    @property
    def status(self) -> dict:
        """What was spent, and why the run stopped if it did; written at its end."""
        return read_json(self.folder / "status.json")

    @property
    def unfinished(self) -> list[str]:
        """Experiments of the plan without a result."""
        return [e["name"] for e in self.plan["identity"]["experiments"] if e["name"] not in self.experiments]


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises RunError when a file of it is missing or damaged."""
    with holding(folder):
        return _read_run(folder)


def _read_run(folder: Path) -> Run:
    run = Run(
        folder,
        read_json(folder / "plan.json"),
        read_json(folder / "example.json"),
        read_json(folder / "baselines.json"),
        {split: read_json_lines(folder / f"{split}.jsonl") for split in ("val", "test")},
    )
    for experiment in run.plan["identity"]["experiments"]:
        path = folder / "experiments" / Path(experiment["name"]).name
        if not (path / "metrics.json").exists():
            continue
        result = read_json(path / "settings.json") | {
            "metrics": read_json(path / "metrics.json"),
            "seconds": read_json(path / "seconds.json"),
        }
        result["forecasts"] = {split: read_json_lines(path / f"forecasts.{split}.jsonl") for split in result["metrics"]}
        if result["training"]:
            losses = csv.DictReader(read_text(path / "losses.csv").splitlines())
            result["losses"] = [float(row["loss"]) for row in losses]
        run.experiments[experiment["name"]] = result
    return run


def methods_of(name: str, experiment: dict) -> dict[str, dict]:
    """The forecasts of an experiment, metrics by split: the likeliest digits and, where it drew samples, their mean."""
    methods = {name: experiment["metrics"]}
    for split, metrics in experiment["metrics"].items():
        if "mean_of_samples" in metrics:
            drawn = methods.setdefault(f"{name}, mean of {metrics['probabilistic']['samples']} samples", {})
            drawn[split] = metrics["mean_of_samples"]
    return methods


def number(value: float | None) -> str:
    """Four decimals, or two digits and an exponent where that would show nothing."""
    if value is None:
        return NONE
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def log10(flops: int | float) -> str:
    """10^x as the report writes FLOPs."""
    return f"10^{math.log10(flops):.3f}" if flops else "0"


def bracket(interval: list[float] | None, write: Callable[[float], str] = number) -> str:
    """An interval as a cell of a table."""
    return f"[{write(interval[0])}, {write(interval[1])}]" if interval else NONE


def mse_row(name: str, by_split: dict) -> list[str]:
    """The MSE of a method under MSE_COLUMNS, from its metrics by split."""
    cells = [name]
    for split in ("val", "test"):
        first, every = (by_split.get(split, {}).get(part, {}) for part in ("first", "all"))
        interval = every.get("mse_interval")
        cells += [
            number(first.get("mse")),
            number(every.get("mse")),
            bracket(interval) if interval else NONE,
            number(every.get("mse_median")),
        ]
    return cells
