"""The measurements as Markdown."""

import statistics
from collections.abc import Mapping, Sequence

from experiments.benchmarking.side import OURS

LEGEND = (
    f"A cell is the median; in brackets, how many times {OURS}'s. spread: the largest of a side in the line, largest "
    f"minus smallest run over the median. The last two columns are {OURS}'s. -: not measured, mostly because the side "
    f"cannot do it. The loading of {OURS} leaves out the packing of its weights. llama.cpp begins to decode a batch "
    "while it still reads other prompts, so that of its forecasts only the whole can be compared."
)


def table(measured: dict) -> str:
    """Two tables, of generation and of training, and what else was measured."""
    generation = [line for line in measured["lines"] if not line["name"].startswith("LoRA")]
    training = [line for line in measured["lines"] if line["name"].startswith("LoRA")]
    peaks = {name.startswith("LoRA"): (name, peak) for name, peak in measured["peak"].items()}
    parts = [
        _part(generation, measured["sides"], peaks.get(False), measured["scores"]),
        _part(training, measured["sides"], peaks.get(True), {}),
        LEGEND,
    ]
    rates, reads = ([line[limit] / 1e9 for line in measured["lines"]] for limit in ("matrix_flops", "bandwidth"))
    spread = f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s in matrix products, {min(reads):.1f} to {max(reads):.1f}"
    parts.append(f"Limits of the machine over all lines: {spread} GB/s read.")
    lines = []
    for side, fits in measured["growth"].items():
        for name, fit in fits.items():
            line = f"{fit['start']:.4g} s + {fit['seconds_per_unit']:.3g} s each; exponent {fit['exponent']:.2f}"
            lines.append(f"- {side}, {name}: {line}")
    reading = measured["cache_read_seconds_per_position"]
    lines.append(f"- reading the cache at that bandwidth: {reading:.3g} s per position")
    return "\n\n".join([*parts, "\n".join(lines)])


def _part(
    lines: Sequence[dict], sides: Sequence[str], peak: tuple[str, dict] | None, scores: Mapping[str, dict]
) -> str:
    """A table of lines, with a column for each side that is in one of them."""
    present = [side for side in sides if any(side in line["seconds"] for line in lines)]
    rows = [["", *present, "spread", "work/s", "share of the limit"]]
    for line in lines:
        medians = {side: statistics.median(seconds) for side, seconds in line["seconds"].items()}
        spread = max((max(line["seconds"][side]) - min(line["seconds"][side])) / medians[side] for side in medians)
        share = "-"
        if line["flops"]:
            share = f"{line['flops'] / medians[OURS] / line['matrix_flops']:.0%} of matrix rate"
        elif line["bytes"]:
            share = f"{line['bytes'] / medians[OURS] / line['bandwidth']:.0%} of bandwidth"
        work = f"{line['work'] / medians[OURS]:.4g} {line['unit']}"
        rows.append([line["name"], *_cells(medians, present, "{:.4g} s"), f"{spread:.0%}", work, share])
    for name, found in scores.items():
        rows.append([name, *(_score(found.get(side)) for side in present), "-", "-", "-"])
    if peak:
        sizes = {side: each[0] / 1e9 for side, each in peak[1].items()}
        rows.append([f"peak memory, {peak[0]}", *_cells(sizes, present, "{:.2f} GB"), "-", "-", "-"])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(values: Mapping[str, float], sides: Sequence[str], form: str) -> list[str]:
    """A cell for each side: its value, and next to it how many times ours."""
    cells = []
    for side in sides:
        if side not in values:
            cells.append("-")
        else:
            times = "" if side == OURS else f" ({values[side] / values[OURS]:.2f} x)"
            cells.append(form.format(values[side]) + times)
    return cells


def _score(score: dict | None) -> str:
    if score is None:
        return "-"
    malformed = f", {score['malformed']} of {score['values']} malformed" if score["malformed"] else ""
    return f"{score['mse']:.4f}{malformed}"
