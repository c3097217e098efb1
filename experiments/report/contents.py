"""What the pages of runs show. The rows of a table are dicts by column; a function with a `path` draws one file."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.forecasting.scores import paired
from experiments.report import figures, published
from experiments.report.results import EXACT, SPLITS, Result, Run, methods_of
from experiments.report.words import NO_VALUE, bracket, cell, duration, flops, number, percent
from experiments.study.plans import HORIZON
from experiments.study.records import Metrics, Scores

Rows = Mapping[str, Mapping[str, Any]]
Methods = dict[str, dict[str, Scores]]  # by name and split

MOST_CURVES = 3  # of ours in a figure
OTHER_ERRORS = {  # by title; columns of nothing but 0 are left out
    "MAE": "mae",
    "free loss": "free_loss",
    "forced loss": "forced_loss",
    "nats per value": "nats_per_value",
    "malformed values": "malformed_values",
    "unscored tokens": "unscored_tokens",
}


def table(first: str, rows: Rows) -> list[list[str]]:
    """The cells of a table, header first, with the names of the rows under `first`.

    Columns that have no value in any row are left out.
    """
    titles = dict.fromkeys(title for row in rows.values() for title in row)
    columns = {title: [cell(row.get(title)) for row in rows.values()] for title in titles}
    shown = {title: cells for title, cells in columns.items() if {*cells} != {NO_VALUE}}
    return [[first, *shown], *(list(row) for row in zip(rows, *shown.values(), strict=True))]


def ranked(baselines: Methods, experiments: Mapping[str, Result]) -> Rows:
    """The mean squared errors of all methods: the smallest test error first, then those of validation alone."""
    methods = baselines | methods_of(experiments)

    def order(name: str) -> list[float]:
        return [methods[name][split].all.mse_filled if split in methods[name] else np.inf for split in SPLITS]

    rows: dict[str, dict] = {name: {} for name in sorted(methods, key=order)}
    for name, row in rows.items():
        for split in sorted(methods[name], key=SPLITS.index):
            scores, every = methods[name][split], methods[name][split].all
            row |= {f"{split}, all": every.mse, f"{split}, interval": every.mse_interval}
            row |= {f"{split}, median": every.mse_median, f"{split}, first ten": scores.first.mse}
    return rows


def other_errors(run: Run) -> Rows:
    """The errors and losses that `ranked` does not have, and what is missing, of each experiment and split."""
    rows = {}
    for name, metrics in run.metrics.items():
        rows[name] = {title: getattr(metrics.all, field) or None for title, field in OTHER_ERRORS.items()}
        rows[name]["MSE, filled"] = metrics.all.mse_filled if metrics.all.malformed_values else None
    return rows


def samples(run: Run) -> Rows:
    """The scores of sampled paths, and the absolute errors of the baselines; no rows if there are no samples."""
    rows: dict[str, dict] = {}
    for name, metrics in run.metrics.items():
        if drawn := metrics.probabilistic:
            rows[name] = {"samples": drawn.samples, "CRPS": drawn.crps, "interval": drawn.crps_interval}
            rows[name] |= {"50 % interval": percent(drawn.coverage_50), "80 % interval": percent(drawn.coverage_80)}
    points = {f"{name}, test": by_split["test"].all.mae for name, by_split in run.baselines.items()}
    return rows and rows | {name: {"samples": "point", "CRPS": error} for name, error in points.items()}


def against_others(run: Run) -> Mapping[str, Rows]:
    """For each method of the experiment that is best on validation: its comparison with all others, by sequence."""
    each = {name: scores.mse_each for name, scores in run.tests.items()}
    found: dict[str, dict] = {name: {} for name in methods_of(dict([*run.judged.items()][-1:])) if name in each}
    for ours, name in product(found, each):
        if name != ours and (pair := paired(each[ours], each[name])):
            found[ours][name] = {
                "difference of MSE": f"{pair['difference']:+.4f}",
                "its interval, often too narrow": bracket(pair["interval"], "{:+.4f}".format),
                "ratio of geometric mean MSE": f"{pair['ratio']:.3g}",
                "its 95 % interval": bracket(pair["ratio_interval"], "{:.3g}".format),
                "sequences where it is better": percent(pair["better"], 0),
            }
    return found


def counting(experiments: Iterable, convention: str) -> str:
    """By which rules the FLOPs of experiments are counted: always exactly for a decoder that reads values."""
    reads_text = {one.training.reads == "text" for one in experiments if one.training}
    if reads_text == {True, False}:
        return f"text: convention {convention}; numbers: exact"
    return "convention exact" if reads_text == {False} else f"convention {convention}"


def costs(experiments: Mapping[str, Result], conventions: Iterable[str]) -> Rows:
    """Steps, FLOPs by convention, and times."""
    return {
        name: {
            "steps": one.training.steps if one.training else None,
            **{convention: flops(one.flops.get(convention)) for convention in conventions},
            **{part: duration(seconds) for part, seconds in one.seconds.items()},
        }
        for name, one in experiments.items()
    }


def published_next_to(metrics: Mapping[str, Metrics], names: Iterable[str] = published.VALIDATION) -> Rows:
    """What the study published of experiments, on its ten sequences of a split, next to ours of the same name."""
    rows = {}
    for split, name in product(published.ERRORS, names):
        if name in published.ERRORS[split]:
            error, loss, log10 = published.ERRORS[split][name]
            ours = metrics.get(f"{name}, {split}")
            rows[f"{name}, {split}"] = {
                "MSE": ours and ours.first.mse,
                "MSE, published": error,
                "free loss": ours and ours.first.free_loss,
                "free loss, published": loss,
                "FLOPs, published": log10 and flops(10**log10),
            }
    return rows


def worst(result: Result) -> list[int]:
    """The test sequences with the largest errors, as many as a figure shows, the largest first."""
    known = {row: line.mse for row, line in enumerate(result.forecasts["test"]) if line.mse is not None}
    return sorted(known, key=known.__getitem__, reverse=True)[: figures.MAX_SERIES]


def best(trained: Mapping[str, Result]) -> str:
    """The training with the smallest validation error."""
    return min(trained, key=lambda name: trained[name].metrics["val"].all.mse_filled)


def settings(trained: Mapping[str, Result]) -> tuple[str, Rows]:
    """The settings that trainings share, in words, and the others of each."""

    def written(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:g}"
        return " + ".join(value) if isinstance(value, tuple) else str(value)

    rows = {
        name: {key: written(value) for key, value in vars(one.training).items() if value is not None}
        for name, one in trained.items()
    }
    shared = dict(set.intersection(*({*row.items()} for row in rows.values())))
    words = [f"{key} {value}" for key, value in next(iter(rows.values())).items() if key in shared]
    others = {name: {key: value for key, value in row.items() if key not in shared} for name, row in rows.items()}
    return ", ".join(words), others


def losses(trained: Mapping[str, Result], path: Path) -> None:
    """Draw the losses of trainings, with the best on validation in colour."""
    figures.losses({name: one.losses for name, one in trained.items()}, best(trained), path=path)


def by_flops(baselines: Methods, experiments: Mapping[str, Result], split: str, convention: str, path: Path) -> None:
    """Draw the errors on a split against the FLOPs of each training; baselines and untrained models are levels.

    Trainings whose names are the same up to the first hyphen have the same mark.
    """
    levels = {name: by_split[split].all.mse for name, by_split in baselines.items()}
    points: dict[str, list[tuple]] = {}
    for name, experiment in experiments.items():
        for method, by_split in methods_of({name: experiment}).items():
            # the baselines have read rounded contexts, so they do not compare with exact ones
            if split not in by_split or method.endswith(EXACT):
                continue
            errors = by_split[split].all
            if experiment.training:
                interval = None if errors.malformed_values else errors.mse_interval
                low, high = interval or (errors.mse_filled, errors.mse_filled)
                kind = re.sub("-[^,]*", "", method.rpartition(": ")[2])
                points.setdefault(kind, []).append((experiment.flops[convention], errors.mse_filled, low, high))
            elif errors.mse_filled not in levels.values():  # two runs have the same untrained model
                name = method.rpartition(": ")[2]
                levels[method if name in levels else name] = errors.mse_filled
    x = f"training FLOPs\n({counting(experiments.values(), convention)})"
    figures.against_flops(points, levels, x, path)


def sequences(run: Run, name: str, split: str, rows: Sequence[int], path: Path) -> None:
    """Draw sequences of a split, the last one for those that it lacks, with the central 80 % of their samples."""
    forecasts, lines = [], run.experiments[name].forecasts[split]
    for row in dict.fromkeys(min(row, len(lines) - 1) for row in rows):
        line, context = lines[row], run.contexts[split][row]
        title = f"sequence {row}, MSE {number(line.mse)}"
        forecasts.append(figures.Fan(title, context.context, line.forecast, context.truth, line.quantiles))
    figures.fans(["prey", "predator"], forecasts, path, judged=HORIZON)


def errors(run: Run, path: Path) -> None:
    """Draw the test error of every baseline and every method of a judged experiment."""
    tests = {name: scores.all for name, scores in run.tests.items()}
    known = {name: (one.mse, one.mse_interval) for name, one in tests.items() if one.mse}
    figures.errors(known, known.keys() - run.baselines.keys(), path)


def by_horizon(run: Run, path: Path) -> None:
    """Draw the test error of the baselines, which are grey, and of the best of ours at each forecast step."""
    lines = {}
    for name in [*run.baselines, *[*run.judged][-MOST_CURVES:]]:
        curve = np.array((run.tests[name].long or run.tests[name].all).mse_by_horizon or [], dtype=float)
        lines[name] = (1 + np.arange(len(curve)), curve, figures.OTHER if name in run.baselines else {})
    figures.curves(lines, "forecast step", "MSE (scaled units)", log=True, path=path)
