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

from experiments.report.words import number
from experiments.storage.files import write_whole

# our model is blue, the truth is almost black, everything else is grey with its name next to it; a second colour is for
# the predators, where they share a picture with the prey
OURS = PREY = "#1f6fb4"
PREDATOR, GREY, TEXT, GRID = "#d1602b", "#767676", "#333333", "#dddddd"
LINES = ("-", "--", "-.", ":")
WIDTH = 5  # inches: on a phone's 360 pixels the letters have 8 to 10
MAX_SERIES, MAX_COLUMNS = 5, 3  # per figure
MIN_HISTORY = 50  # time steps of a context that a fan shows, or as many as the forecast has if that is more
FORMATS = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # with what is left out
OTHER = {"color": GREY, "linewidth": 0.8, "marker": None}  # lines next to the main one
STYLE: dict[Any, Any] = {  # the functions draw with it and leave the caller's settings alone
    "figure.figsize": (WIDTH, 3),
    "figure.dpi": 144,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TEXT,
    "axes.axisbelow": True,
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


class _Plain(LogFormatter):
    """The numbers of a logarithmic axis as people write them: 0.001, 1e15."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return f"{value:g}".replace("e+", "e") if super().__call__(value, position) else ""


def _lay_out(figure: Figure) -> None:
    """Fit the axes into a figure."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
        axis.set_major_formatter(_Plain())
        axis.set_minor_formatter(_Plain(labelOnlyBase=False))
    figure.tight_layout()


def _name_ends(axes: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write names to the right of the axes, at the height (x, y, color) where their lines end or close to it."""
    _lay_out(axes.figure)
    order = sorted(ends, key=lambda name: ends[name][1])
    own = axes.transAxes.inverted().transform(axes.transData.transform([ends[name][:2] for name in order]))[:, 1]
    apart = np.arange(len(order)) * 11 / 72 * axes.figure.dpi / axes.bbox.height
    above = np.maximum.accumulate(
        own - apart
    )  # those above give way, or those below; the middle of both keeps its place
    below = np.minimum.accumulate((own - apart)[::-1])[::-1]
    for name, height in zip(order, apart + (above + below) / 2, strict=True):
        x, y, color = ends[name]
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
        style = {"color": color, "fontsize": 9, "va": "center", "annotation_clip": False, "arrowprops": line}
        axes.annotate(name, (x, y), (1.04, height), textcoords="axes fraction", **style)


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
    figure = Figure()
    axes = figure.subplots()
    ends = {}
    for index, (label, (steps, values, *given)) in enumerate(lines.items()):
        style: dict[str, Any] = {"color": OURS, "linewidth": 1.5, "markersize": 3}
        style["linestyle"] = LINES[index % len(LINES)] if len(lines) > 2 else "-"
        style["marker"] = "o" if len(steps) <= 40 else None
        style |= given[0] if given else {}
        axes.plot(steps, values, label=label, **style)
        shown = np.flatnonzero(np.isfinite(values) & ((np.asarray(values) > 0) | (not log)))
        if len(shown):
            ends[label] = (steps[shown[-1]], values[shown[-1]], style["color"])
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    axes.locator_params(axis="x", integer=True)
    if len(ends) > 2:
        _name_ends(axes, ends)
    elif len(lines) > 1:
        axes.legend()
    _save(figure, path)


def losses(trainings: Mapping[str, Sequence[float]], best: str | None = None, *, path: Path) -> None:
    """Draw moving averages of training losses, by label, over 10 steps or a hundredth of them if that is more; of a
    single training also the loss of each step. With `best`, all others are grey.
    """
    lines: dict[str, tuple] = {}
    if len(trainings) == 1:
        (one,) = trainings.values()
        lines["each step"] = (range(len(one)), one, OTHER)
    what = "training loss" if lines else "training loss, moving average"
    for label, each in trainings.items():
        means = smoothed(each, max(10, len(each) // 100))  # each at the middle of its steps
        middles = np.arange(len(means)) + (len(each) - len(means)) / 2
        lines[label] = (middles, means, OTHER if best not in (label, None) else {})
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
    judged: int = 0,
) -> None:
    """Draw forecasts after the newest part of their contexts: a panel for each of the first MAX_SERIES series and each
    variable.

    contexts: N arrays (T, D); values and truths: N arrays (h, D); bands: N arrays (Q, q, D), of which the lowest and
    the highest bound the band over the first q steps; times: for each series, the times of contexts and values (T + h);
    judged: the number of forecast steps that are marked as those that the errors are of.
    """
    num_series, num_variables = min(len(contexts), MAX_SERIES), len(names)
    columns, used = min(num_variables, MAX_COLUMNS), num_series * num_variables
    rows = -(-used // columns)
    figure = Figure(figsize=(max(WIDTH, 2.5 * columns), (2.6 if used == columns else 1.6) * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[used:]:
        panel.set_axis_off()
    for panel, (row, column) in zip(panels[:used], product(range(num_series), range(num_variables)), strict=True):
        past, following = contexts[row][:, column], values[row][:, column]
        x = np.arange(len(past) + len(following)) if times is None else np.asarray(times[row])
        now = len(past) - 1  # lines after it begin at the last given value
        shown = slice(max(0, len(past) - max(MIN_HISTORY, len(following))), len(past))
        if judged:
            end = min(now + judged, len(x) - 1)
            panel.axvspan(x[now], x[end], color=GRID, linewidth=0, label=f"first {judged} steps: judged")
        panel.plot(x[shown], past[shown], color=GREY, linewidth=1.2, label="given")
        if truths is not None:
            joined = np.concatenate((past[-1:], truths[row][:, column]))
            panel.plot(x[now : now + len(joined)], joined, color=TEXT, linewidth=1, label="truth")
        if bands is not None:
            low, high = bands[row][:, :, column].min(axis=0), bands[row][:, :, column].max(axis=0)
            inside = slice(len(past), len(past) + len(low))
            panel.fill_between(x[inside], low, high, color=OURS, alpha=0.3, linewidth=0, label=band_label)
        panel.plot(x[now:], np.concatenate((past[-1:], following)), color=OURS, linewidth=1.7, label="forecast")
        named = len(contexts) > 1 and (column == 0 or num_variables > MAX_COLUMNS)
        panel.set(title=titles[row] if named else "", ylabel=names[column])
        panel.set_xlabel("time step" if times is None and row == num_series - 1 else "")
        if times is None:
            panel.locator_params(axis="x", integer=True)
        else:
            panel.tick_params(axis="x", rotation=30)
    legend = panels[0].get_legend_handles_labels()
    columns = 3 if len(legend[0]) > 4 else 4
    figure.legend(*legend, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, columnspacing=1.2)
    _save(figure, path)


@rc_context(STYLE)
def errors(
    values: Mapping[str, tuple[float, Sequence[float] | None]],
    ours: set[str],
    path: Path,
    x: str = "mean squared error (scaled units)",
) -> None:
    """Draw an error with its interval for each method, on a logarithmic axis, the smallest on top; `ours` in colour."""
    ordered = sorted(values, key=lambda name: values[name][0], reverse=True)
    figure = Figure(figsize=(WIDTH, 0.6 + 0.36 * len(ordered)))
    axes = figure.subplots()
    for row, name in enumerate(ordered):
        error, interval = values[name]
        color = OURS if name in ours else GREY
        if interval:
            axes.plot(interval, [row, row], color=color, linewidth=2, solid_capstyle="round")
        axes.plot(error, row, "o", color=color, markersize=7)
        axes.annotate(number(error), (error, row), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xscale="log", xlabel=x, ylim=(-0.6, len(ordered) - 0.2))
    axes.set_yticks(range(len(ordered)), ordered)
    _save(figure, path)


@rc_context(STYLE)
def against_flops(
    points: Mapping[str, tuple],
    levels: Mapping[str, float | None],
    hollow: Mapping[str, tuple] | None = None,
    *,
    convention: str,
    path: Path,
) -> None:
    """Draw error against the FLOPs of a training on logarithmic axes: points for trainings, lines for `levels`.

    points and hollow: (FLOPs, error) or (FLOPs, error, low, high) by name, in FLOPs of the convention. A name without
    room is left out: `points` come before `hollow`, and smaller errors before larger ones.
    """
    figure = Figure(figsize=(WIDTH, 4))
    axes = figure.subplots()
    known = {name: level for name, level in levels.items() if level}
    for level in known.values():
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1, zorder=1)
    marked: list[tuple[str, int, float, str]] = []
    for group, color, fill in ((points, OURS, OURS), (hollow or {}, TEXT, "none")):
        for name, (flops, error, *interval) in sorted(group.items(), key=lambda named: named[1][1]):
            if not error > 0:  # a logarithmic axis has no 0
                continue
            axes.plot(flops, error, "o", color=color, markerfacecolor=fill, markersize=5)
            if interval:
                axes.vlines(flops, *interval, color=color, linewidth=1.2, zorder=2)
            marked.append((name, flops, error, color))
    axes.set(
        xlabel=f"training FLOPs (convention: {convention})", ylabel="MSE (scaled units)", xscale="log", yscale="log"
    )
    if marked:
        flops = [each[1] for each in marked]
        axes.set_xlim(min(flops) / 2, max(flops) * 2)
    if known:
        _name_ends(axes, {name: (axes.get_xlim()[1], level, GREY) for name, level in known.items()})
    _lay_out(figure)  # names are placed in the final layout
    centres = [axes.transData.transform((flops, error)) for _, flops, error, _ in marked]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]  # in pixels
    for (name, flops, error, color), own in zip(marked, list(taken), strict=True):
        for offset, side in (((5, -3), "left"), ((-5, -3), "right"), ((0, 6), "center"), ((0, -11), "center")):
            style: dict[str, Any] = {"color": color, "ha": side, "fontsize": 8, "zorder": 1.5}
            label = axes.annotate(name, (flops, error), offset, textcoords="offset points", **style)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})  # over the levels
            box = label.get_window_extent()
            inside = all(axes.bbox.contains(*corner) for corner in (box.p0, box.p1))
            if inside and not any(box.overlaps(other) for other in taken if other is not own):
                taken.append(box)
                break
            label.remove()
    _write(figure, path)
