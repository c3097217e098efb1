"""The figures of a report. Each function draws numbers and writes one file: PNG, SVG or PDF, by its name."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image  # of matplotlib

from experiments.report.words import number
from experiments.storage.files import write_whole

# our model is blue, the truth is almost black, everything else is grey with its name next to it; the notebook has
# a second colour for the predators. All four differ without red or green, too, and stand out from white (3:1)
OURS = PREY = "#1f6fb4"
PREDATOR, GREY, TEXT, GRID = "#d1602b", "#767676", "#333333", "#dddddd"
LINES, MARKS = ("-", "--", "-.", ":"), "os^DvPX*pdh"
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
    # those above give way, or those below; the middle of both keeps its place
    above = np.maximum.accumulate(own - apart)
    below = np.minimum.accumulate((own - apart)[::-1])[::-1]
    for name, height in zip(order, apart + (above + below) / 2, strict=True):
        x, y, color = ends[name]
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        style = {"color": color, "fontsize": 9, "va": "center", "annotation_clip": False, "arrowprops": line}
        axes.annotate(name, (x, y), (1.04, height), textcoords="axes fraction", **style)


def _save(figure: Figure, path: Path) -> None:
    _lay_out(figure)
    image = io.BytesIO()
    suffix = path.suffix.lower()
    figure.savefig(image, format=suffix[1:], metadata=FORMATS[suffix], bbox_inches="tight")
    if suffix == ".png":  # 256 colours are enough, and take two fifths of the bytes
        colored = Image.open(image).convert("RGB").quantize()
        image = io.BytesIO()
        colored.save(image, "PNG", optimize=True)
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


def losses(trainings: Mapping[str, Sequence[float]], best: str, path: Path) -> None:
    """Draw moving averages of training losses, `best` in colour; of a single training also the loss of each step.

    They are over 10 steps, as in the study, over a hundredth of the steps if that is more, over half of them if less.
    """
    lines: dict[str, tuple] = {}
    for label, each in trainings.items():
        if len(trainings) == 1:
            lines["each step"] = (range(len(each)), each, OTHER)
        window = min(max(10, len(each) // 100), 1 + len(each) // 2)
        means = np.convolve(each, np.ones(window) / window, mode="valid")  # each at the middle of its steps
        lines[label] = (np.arange(len(means)) + (window - 1) / 2, means, {} if label == best else OTHER)
    curves(lines, "optimizer step", "training loss", path=path)


@dataclass(frozen=True)
class Fan:
    """A forecast (h, D) after its context (T, D)."""

    title: str
    context: np.ndarray
    values: np.ndarray
    truth: np.ndarray | None = None  # (h, D)
    band: np.ndarray | None = None  # (Q, q, D): the lowest and the highest of Q bound the first q steps
    times: Sequence | None = None  # of context and values (T + h)


@rc_context(STYLE)
def fans(
    names: Sequence[str], forecasts: Sequence[Fan], path: Path, band_label: str = "80 % interval", judged: int = 0
) -> None:
    """Draw forecasts after the newest part of their contexts: a panel for each of the first MAX_SERIES forecasts and
    each of the D variables in `names`. The first `judged` steps are marked as those that the errors are of.
    """
    num_series, num_variables = min(len(forecasts), MAX_SERIES), len(names)
    columns, used = min(num_variables, MAX_COLUMNS), num_series * num_variables
    rows = -(-used // columns)
    figure = Figure(figsize=(max(WIDTH, 2.5 * columns), (2.6 if used == columns else 1.6) * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[used:]:
        panel.set_axis_off()
    for panel, (one, column) in zip(panels, product(forecasts[:num_series], range(num_variables)), strict=False):
        past, following = one.context[:, column], one.values[:, column]
        x = np.arange(len(past) + len(following)) if one.times is None else np.asarray(one.times)
        now = len(past) - 1  # lines after it begin at the last given value
        shown = slice(max(0, len(past) - max(MIN_HISTORY, len(following))), len(past))
        if judged:
            end = min(now + judged, len(x) - 1)
            panel.axvspan(x[now], x[end], color=GRID, linewidth=0, label=f"first {judged} steps: judged")
        panel.plot(x[shown], past[shown], color=GREY, linewidth=1.2, label="given")
        known = np.pad(np.isfinite(past), 1)
        if (alone := known[1:-1] & ~known[:-2] & ~known[2:])[shown].any():  # a line would not show these
            panel.plot(x[shown][alone[shown]], past[shown][alone[shown]], ".", color=GREY, markersize=3)
        if one.truth is not None:
            panel.plot(x[now:], [past[-1], *one.truth[:, column]], color=TEXT, linewidth=1, label="truth")
        if one.band is not None:
            low, high = one.band[:, :, column].min(axis=0), one.band[:, :, column].max(axis=0)
            inside = x[len(past) : len(past) + len(low)]
            panel.fill_between(inside, low, high, color=OURS, alpha=0.3, linewidth=0, label=band_label)
        panel.plot(x[now:], [past[-1], *following], color=OURS, linewidth=1.7, label="forecast")
        panel.set_ylabel(names[column])
        if len(forecasts) > 1 and (column == 0 or num_variables > MAX_COLUMNS):
            panel.set_title(one.title)
        if one.times is not None:
            if x.dtype.kind == "M":
                panel.xaxis.set_major_locator(locator := AutoDateLocator(minticks=3, maxticks=6))
                panel.xaxis.set_major_formatter(ConciseDateFormatter(locator))
            continue
        panel.locator_params(axis="x", integer=True)
        if one is forecasts[num_series - 1]:
            panel.set_xlabel("time step")
    legend = panels[0].get_legend_handles_labels()
    columns = 3 if len(legend[0]) > 4 else 4
    figure.legend(*legend, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, columnspacing=1.2)
    _save(figure, path)


@rc_context(STYLE)
def errors(
    values: Mapping[str, tuple], ours: set[str], path: Path, x: str = "mean squared error (scaled units)"
) -> None:
    """Draw (error, interval or None) of each method on a logarithmic axis, the smallest on top, `ours` in colour."""
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
    points: Mapping[str, Sequence[tuple]], levels: Mapping[str, float | None], x: str, path: Path
) -> None:
    """Draw error against the FLOPs of trainings on logarithmic axes: a mark for each name, lines for `levels`.

    points: (FLOPs, error, low, high) by name, low and high the interval or both the error. Marks of different names at
    the same FLOPs, to 1 %, stand side by side.
    """
    figure = Figure(figsize=(WIDTH, 4))
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel="MSE (scaled units)", xscale="log", yscale="log")
    known = {name: level for name, level in levels.items() if level}  # a logarithmic axis has no 0
    for level in known.values():
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1, zorder=1)
    for (name, group), mark in zip(points.items(), cycle(MARKS), strict=False):
        flops, errors, low, high = np.array(group).T
        sharing = [
            [one for one in points if any(abs(each[0] / cost - 1) < 0.01 for each in points[one])] for cost in flops
        ]
        places = flops * [1.15 ** (names.index(name) - (len(names) - 1) / 2) for names in sharing]
        axes.vlines(places, low, high, color=OURS, linewidth=1)
        axes.plot(places, errors, mark, color=OURS, label=name)
    if points:
        flops = [each[0] for group in points.values() for each in group]
        axes.set_xlim(min(flops) / 2, max(flops) * 2)
        figure.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    if known:
        _name_ends(axes, {name: (axes.get_xlim()[1], level, GREY) for name, level in known.items()})
    _save(figure, path)
