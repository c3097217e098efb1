"""The measurements as Markdown."""

from collections.abc import Mapping, Sequence
from statistics import median

from experiments.benchmarking.side import OURS

LEGEND = (
    f"A cell is the median; in brackets, how many times {OURS}'s. spread: the largest of a side in the line, largest "
    f"minus smallest run over the median. The last two columns are {OURS}'s. -: not measured, mostly because the side "
    f"cannot do it. The loading of {OURS} leaves out the packing of its weights. llama.cpp begins to decode a batch "
    "while it still reads other prompts, so that of its forecasts only the whole can be compared."
)


def table(measured: dict) -> str:
    """Two tables, of generation and of training, and what else was measured; `measured` is what `measure` returns."""
    rates, reads = ([line[limit] / 1e9 for line in measured["lines"]] for limit in ("matrix_flops", "bandwidth"))
    spread = f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s in matrix products, {min(reads):.1f} to {max(reads):.1f}"
    growth = [
        f"- {side}, {name}: {fit['start']:.4g} s + {fit['seconds_per_unit']:.3g} s each; exponent {fit['exponent']:.2f}"
        for side, fits in measured["growth"].items()
        for name, fit in fits.items()
    ]
    reading = measured["cache_read_seconds_per_position"]
    growth.append(f"- reading the cache at that bandwidth: {reading:.3g} s per position")
    limits = f"Limits of the machine over all lines: {spread} GB/s read."
    return "\n\n".join([_part(measured, False), _part(measured, True), LEGEND, limits, "\n".join(growth)])


def _part(measured: dict, training: bool) -> str:
    """The table of training or of generation, with a column for each side that is in one of its lines."""
    lines = [line for line in measured["lines"] if line["name"].startswith("LoRA") == training]
    sides = [side for side in measured["sides"] if any(side in line["seconds"] for line in lines)]
    rows = [["", *sides, "spread", "work/s", "share of the limit"], ["---"] * (len(sides) + 4)]
    for line in lines:
        medians = {side: median(seconds) for side, seconds in line["seconds"].items()}
        spread = max((max(line["seconds"][side]) - min(line["seconds"][side])) / medians[side] for side in medians)
        share = "-"
        if line["flops"]:
            share = f"{line['flops'] / medians[OURS] / line['matrix_flops']:.0%} of matrix rate"
        elif line["bytes"]:
            share = f"{line['bytes'] / medians[OURS] / line['bandwidth']:.0%} of bandwidth"
        work = f"{line['work'] / medians[OURS]:.4g} {line['unit']}"
        rows.append([line["name"], *_cells(medians, sides, "{:.4g} s"), f"{spread:.0%}", work, share])
    for name, found in measured["scores"].items() if not training else ():
        rows.append([name, *(_score(found.get(side)) for side in sides), "-", "-", "-"])
    for name, found in measured["peak"].items():
        if name.startswith("LoRA") == training:
            sizes = {side: size / 1e9 for side, size in found.items()}
            rows.append([f"peak memory, {name}", *_cells(sizes, sides, "{:.2f} GB"), "-", "-", "-"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(values: Mapping[str, float], sides: Sequence[str], form: str) -> list[str]:
    """A cell for each side: its value, and next to it how many times ours."""
    times = {side: "" if side == OURS else f" ({value / values[OURS]:.2f} x)" for side, value in values.items()}
    return [form.format(values[side]) + times[side] if side in values else "-" for side in sides]


def _score(score: dict | None) -> str:
    if score is None:
        return "-"
    malformed = f", {score['malformed']} of {score['values']} malformed" if score["malformed"] else ""
    return f"{score['mse']:.4f}{malformed}"
