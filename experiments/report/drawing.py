"""The figures of a run, from its contents. Each function writes one file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.forecasting.scores import BAND, QUANTILES
from experiments.report import figures
from experiments.report.results import Run, methods_of
from experiments.report.rows import long_errors
from experiments.report.words import number


def bands(run: Run, name: str, split: str, rows: Sequence[int]) -> np.ndarray | None:
    """The bounds (N, 2, h, 2) of the central 80 % of the samples of N sequences; None if one of them has none."""
    quantiles = [run.experiments[name].forecasts[split][row].quantiles or [None] * len(QUANTILES) for row in rows]
    bounds = [[each[QUANTILES.index(level)] for level in BAND] for each in quantiles]
    return None if any(bound is None for pair in bounds for bound in pair) else np.array(bounds)


def sequences(run: Run, name: str, split: str, rows: Sequence[int], steps: int | None = None, *, path: Path) -> None:
    """Draw sequences of a split, with the central 80 % of the samples if there are some; steps: None draws all."""
    lines = [run.experiments[name].forecasts[split][row] for row in rows]
    figures.fan(
        ["prey", "predator"],
        [run.contexts[split][row].context for row in rows],
        [line.forecast[:steps] for line in lines],
        bands(run, name, split, rows),
        path,
        [line.truth[:steps] for line in lines],
        [f"sequence {row}, MSE {number(line.mse)}" for row, line in zip(rows, lines, strict=True)],
    )


def errors(run: Run, path: Path) -> None:
    """Draw the test error of every baseline and every method of a judged experiment."""
    ours = methods_of(run.judged)
    tests = {name: by_split["test"].all for name, by_split in (run.baselines | ours).items() if "test" in by_split}
    figures.errors({name: (one.mse, one.mse_interval) for name, one in tests.items() if one.mse}, set(ours), path)


def by_horizon(run: Run, path: Path) -> None:
    """Draw the test error at each forecast step; baselines are dashed."""
    found = long_errors(run)
    ours_first = sorted(found, key=lambda name: name in run.baselines)
    curves = {name: np.array(found[name].mse_by_horizon, dtype=float) for name in ours_first}
    lines = {name: (1 + np.arange(len(curve)), curve) for name, curve in curves.items()}
    dashed = {"linestyle": "--", "marker": None}
    figures.curves(lines, path, "forecast step", "MSE (scaled units)", run.baselines.keys(), dashed, log=True)
