"""The figures of a report. Each function draws numbers and writes one file: PNG, SVG or PDF, by its name."""

import io
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from matplotlib.transforms import Bbox

from experiments.storage.files import write_whole

PREY, PREDATOR, TEXT, GRID = "#1f6fb4", "#d1602b", "#333333", "#dddddd"
MAX_SERIES, MAX_COLUMNS = 5, 3  # per figure
MIN_HISTORY = 50  # time steps of a context that a fan shows, or three times the forecast if that is more
FORMATS = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # with what is left out
PALE, DASHED = {"alpha": 0.35, "linewidth": 0.8}, {"linestyle": "--", "marker": None}  # lines next to the main one
CURVES = (PREY, PREDATOR, "#2f8f5b", "#8a5ab5", "#b5a13a", "#4aa5b5", "#b54a7a", "#7a7a7a", "#111111")
STYLE: dict[Any, Any] = {  # the functions draw with it and leave the caller's settings alone
    "figure.figsize": (7, 3.4),
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TEXT,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a dollar
    "svg.hashsalt": "qwen-min",  # so that the same numbers give the same file
}


def smoothed(values: Sequence[float], window: int = 10) -> np.ndarray:
    """Moving average over `window` steps, (len - window + 1) values; for shorter input one value, the mean."""
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _save(figure: Figure, path: Path) -> None:
    _lay_out(figure)
    _write(figure, path)


def _lay_out(figure: Figure) -> None:
    """Fit the axes into a figure, with numbers such as 1e-03 on logarithmic ones: formulas are off."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    figure.tight_layout()


def _write(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    suffix = path.suffix.lower()
    figure.savefig(image, format=suffix[1:], metadata=FORMATS[suffix], bbox_inches="tight")
    write_whole(path, image.getvalue())


@rc_context(STYLE)
def curves(lines: Mapping[str, tuple], x: str, y: str, log: bool = False, *, path: Path) -> None:
    """Draw lines (steps, values) or (steps, values, style) by label; NaN leaves a gap.

    x and y: what the axes show; log: on a logarithmic scale.
    """
    figure = Figure(figsize=(9, 4) if len(lines) > 2 else None)
    axes = figure.subplots()
    for index, (label, (steps, values, *given)) in enumerate(lines.items()):
        style: dict[str, Any] = {"color": CURVES[index % len(CURVES)], "linewidth": 1.5, "markersize": 3}
        style["marker"] = "o" if len(steps) <= 40 else None
        axes.plot(steps, values, label=label, **style | (given[0] if given else {}))
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    if len(lines) > 2:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    elif len(lines) > 1:
        axes.legend()
    axes.locator_params(axis="x", integer=True)
    _save(figure, path)


def losses(trainings: Mapping[str, Sequence[float]], best: str | None = None, *, path: Path) -> None:
    """Draw averages over 10 steps of training losses, by label; of a single training also the loss of each step.

    With `best`, all others are pale.
    """
    lines: dict[str, tuple] = {}
    if len(trainings) == 1:
        (one,) = trainings.values()
        lines["each step"] = (range(len(one)), one, PALE)
    what = "training loss (nats)" if lines else "training loss (nats), 10-step average"
    for label, each in trainings.items():
        means = smoothed(each)  # each at the middle of its steps
        middles = np.arange(len(means)) + (len(each) - len(means)) / 2
        lines[label] = (middles, means, PALE if best not in (label, None) else {})
    curves(lines, "optimizer step", what, path=path)


@rc_context(STYLE)
def fan(
    names: Sequence[str],
    contexts: Sequence[np.ndarray],
    values: Sequence[np.ndarray] | np.ndarray,
    bands: Sequence[np.ndarray] | np.ndarray | None,
    path: Path,
    titles: Sequence[str],
    truths: Sequence[np.ndarray] | None = None,
    times: Sequence[Sequence] | None = None,
    band_label: str = "80 % interval",
) -> None:
    """Draw forecasts after the newest part of their contexts: a panel for each of the first MAX_SERIES series and each
    variable.

    contexts: N arrays (T, D); values and truths: N arrays (h, D); bands: N arrays (Q, q, D), of which the lowest and
    the highest bound the band over the first q steps; times: for each series, the times of contexts and values (T + h).
    """
    num_series, num_variables = min(len(contexts), MAX_SERIES), len(names)
    columns, used = min(num_variables, MAX_COLUMNS), num_series * num_variables
    rows = -(-used // columns)
    figure = Figure(figsize=(max(7, 4.6 * columns), 2.6 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[used:]:
        panel.set_axis_off()
    for panel, (row, column) in zip(panels[:used], product(range(num_series), range(num_variables)), strict=True):
        past, following, color = contexts[row][:, column], values[row][:, column], CURVES[column % len(CURVES)]
        x = np.arange(len(past) + len(following)) if times is None else np.asarray(times[row])
        now = len(past) - 1  # lines after it begin at the last given value
        shown = slice(max(0, len(past) - max(MIN_HISTORY, 3 * len(following))), len(past))
        panel.plot(x[shown], past[shown], color=color, linewidth=1.2, alpha=0.55, label="given")
        if truths is not None:
            joined = np.concatenate((past[-1:], truths[row][:, column]))
            panel.plot(x[now : now + len(joined)], joined, color=TEXT, linewidth=1, label="truth")
        if bands is not None:
            low, high = bands[row][:, :, column].min(axis=0), bands[row][:, :, column].max(axis=0)
            inside = slice(len(past), len(past) + len(low))
            panel.fill_between(x[inside], low, high, color=color, alpha=0.25, linewidth=0, label=band_label)
        panel.plot(x[now:], np.concatenate((past[-1:], following)), color=color, linewidth=1.7, label="forecast")
        wrapped = num_variables > MAX_COLUMNS
        title = [names[column]] if row == 0 or wrapped else []
        if len(contexts) > 1 and (column == 0 or wrapped):
            title.append(titles[row])
        panel.set(title=", ".join(title), xlabel="time step" if times is None and row == num_series - 1 else "")
        if times is None:
            panel.locator_params(axis="x", integer=True)
        else:
            panel.tick_params(axis="x", rotation=30)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(legend[0]))
    _save(figure, path)


@rc_context(STYLE)
def errors(
    values: Mapping[str, tuple[float, Sequence[float] | None]],
    ours: set[str],
    path: Path,
    x: str = "mean squared error (scaled units)",
) -> None:
    """Draw an error with its interval for each method, on a logarithmic axis, the largest on top; `ours` in colour."""
    ordered = sorted(values, key=lambda name: values[name][0])
    figure = Figure(figsize=(7.5, 0.6 + 0.32 * len(ordered)))
    axes = figure.subplots()
    for row, name in enumerate(ordered):
        error, interval = values[name]
        color = PREY if name in ours else "#8c8c8c"
        if interval:
            axes.plot(interval, [row, row], color=color, linewidth=2.5, alpha=0.6, solid_capstyle="round")
        axes.plot(error, row, "o", color=color, markersize=7)
        axes.annotate(f"{error:.2g}", (error, row), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=7)
    axes.set(xscale="log", xlabel=x, ylim=(-0.6, len(ordered) - 0.2))
    axes.set_yticks(range(len(ordered)), ordered)
    _save(figure, path)


@rc_context(STYLE)
def against_flops(
    points: Mapping[str, tuple],
    levels: Mapping[str, float | None],
    hollow: Mapping[str, tuple] | None = None,
    *,
    path: Path,
) -> None:
    """Draw error against the FLOPs of a training on logarithmic axes: points for trainings, lines for `levels`.

    points and hollow: (FLOPs, error) or (FLOPs, error, low, high) by name. A name without room is left out: `points`
    come before `hollow`, and smaller errors before larger ones.
    """
    figure = Figure(figsize=(9, 4.5))
    axes = figure.subplots()
    for index, (name, level) in enumerate(levels.items()):
        if level is not None:
            color = CURVES[index % len(CURVES)]
            axes.axhline(level, color=color, linestyle="--", linewidth=1, label=name)
    marked: list[tuple[str, int, float]] = []
    for group, fill in ((points, TEXT), (hollow or {}, "none")):
        for name, (flops, error, *interval) in sorted(group.items(), key=lambda named: named[1][1]):
            if not error > 0:  # a logarithmic axis has no 0
                continue
            axes.plot(flops, error, "o", color=TEXT, markerfacecolor=fill, markersize=4)
            if interval:
                axes.vlines(flops, *interval, color=TEXT, linewidth=1)
            marked.append((name, flops, error))
    axes.set(xlabel="FLOPs of the training", ylabel="MSE (scaled units)", xscale="log", yscale="log")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _lay_out(figure)  # names are placed in the final layout
    centres = [axes.transData.transform((flops, error)) for _, flops, error in marked]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]  # in pixels
    for (name, flops, error), own in zip(marked, list(taken), strict=True):
        for offset, side in (((5, -3), "left"), ((-5, -3), "right"), ((3, 6), "right"), ((3, -11), "right")):
            label = axes.annotate(name, (flops, error), textcoords="offset points", xytext=offset, ha=side, fontsize=7)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5})  # over the lines
            box = label.get_window_extent()
            inside = all(axes.bbox.contains(*corner) for corner in (box.p0, box.p1))
            if inside and not any(box.overlaps(other) for other in taken if other is not own):
                taken.append(box)
                break
            label.remove()
    _write(figure, path)
