"""Figures of a report, drawn from numbers alone; each function writes one PNG."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.runfolder import write_whole

PREY, PREDATOR, TEXT, GRID = "#1f6fb4", "#d1602b", "#333333", "#dddddd"
CURVES = ("#1f6fb4", "#d1602b", "#2f8f5b", "#8a5ab5", "#b5a13a", "#4aa5b5", "#b54a7a", "#7a7a7a", "#111111")
plt.rcParams.update(
    {
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
    }
)


def smoothed(values: list[float], window: int = 10) -> np.ndarray:
    """Moving average over `window` steps, (len - window + 1); shorter input gives its mean."""
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _save(figure, path: Path) -> None:
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)  # steps are whole
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, metadata={"Software": None})
    plt.close(figure)
    write_whole(path, image.getvalue())


def loss_by_step(losses: list[float | None], path: Path) -> None:
    """Cross-entropy of each target token under the free-running logits."""
    figure, axes = plt.subplots()
    axes.plot([np.nan if loss is None else loss for loss in losses], color=PREY, linewidth=1)
    axes.set(xlabel="prediction step (token)", ylabel="cross-entropy (nats)")
    _save(figure, path)


def trajectory(context: list, truth: list, forecast: list, path: Path) -> None:
    """One series: context and truth as lines, the forecast dashed; (C, 2), (h, 2), (h, 2) in scaled units."""
    context, truth = np.array(context), np.array(truth)
    forecast = np.array(forecast, dtype=float)
    figure, axes = plt.subplots()
    past, future = np.arange(len(context)), len(context) + np.arange(len(truth))
    for d, (name, color) in enumerate((("prey", PREY), ("predator", PREDATOR))):
        whole = np.concatenate([context[:, d], truth[:, d]])
        axes.plot(np.concatenate([past, future]), whole, color=color, linewidth=1.2, alpha=0.55, label=f"{name}, true")
        axes.plot(future, forecast[:, d], "o--", color=color, markersize=3, linewidth=1.2, label=f"{name}, forecast")
    axes.axvline(len(context) - 0.5, color=TEXT, linewidth=0.8, linestyle=":")
    axes.set(xlabel="time step", ylabel="population / scale", xlim=(max(0, len(context) - 50), future[-1] + 0.5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, fontsize=8)
    _save(figure, path)


def training_loss(losses: list[float], path: Path) -> None:
    """Raw loss of each step, and its average over 10 steps."""
    figure, axes = plt.subplots()
    axes.plot(losses, color=PREY, alpha=0.35, linewidth=0.8, label="each step")
    mean = smoothed(losses)
    axes.plot(np.arange(len(mean)) + len(losses) - len(mean), mean, color=PREY, linewidth=1.6, label="10-step average")
    axes.set(xlabel="optimizer step", ylabel="training loss (nats)")
    axes.legend()
    _save(figure, path)


def loss_curves(curves: dict[str, list[float]], path: Path, highlight: str | None = None) -> None:
    """10-step averages of several runs by label; with `highlight` all others in grey."""
    figure, axes = plt.subplots(figsize=(9, 4))
    for index, (label, losses) in enumerate(curves.items()):
        mean = smoothed(losses)
        steps = np.arange(len(mean)) + len(losses) - len(mean)
        grey = highlight is not None and label != highlight
        color = "#c4c4c4" if grey else CURVES[index % len(CURVES)]
        style = {"linewidth": 1, "zorder": 1} if grey else {"linewidth": 1.5, "zorder": 2, "label": label}
        axes.plot(steps, mean, color=color, **style)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats), 10-step average")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)
