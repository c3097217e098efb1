"""Asks all sides in turn for each piece of work, and measures the limits of the machine meanwhile."""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import numpy as np
import torch

from experiments.benchmarking.engines import Engine
from experiments.benchmarking.processes import ask, processes
from experiments.benchmarking.side import Completion, Setup, Side, seconds_of
from experiments.benchmarking.work import Contexts, Work, generation, position_bytes, training
from experiments.study import data
from qwen_min import QwenConfig, Tokenizer
from qwen_min.weights import checkpoint_folder

FORECAST_LINES = {  # of a forecast: the seconds that each line adds up
    "prefill": ("prefill",),
    "free decoding": ("free",),
    "constrained decoding": ("constrained",),
    "whole, free": ("prefill", "free"),
    "whole, constrained": ("prefill", "constrained"),
}


class Machine:
    """Measures the limits of the machine."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device = device
        self.factors = [torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2)]
        self.block = torch.ones(2**28, device=device)  # 1 GiB, beyond any cache

    def limits(self) -> tuple[float, float]:
        """Matrix rate in FLOP/s and read bandwidth in bytes/s at this moment, each the best of three runs."""
        multiply = min(seconds_of(lambda: self.factors[0] @ self.factors[1], self.device) for _ in range(3))
        read = min(seconds_of(self.block.sum, self.device) for _ in range(3))
        return 2 * 4096**3 / multiply, self.block.nbytes / read


def measure(model: str, device: str, dtype: str, runs: int, sides: Mapping[str, type[Side]]) -> dict:
    """Measure everything: lines (seconds of each run by side, and what limits them), growth, memory, errors, limits."""
    folder, kind = checkpoint_folder(model), getattr(torch, dtype)
    config = QwenConfig.from_file(folder / "config.json")
    contexts = Contexts(Tokenizer(folder / "tokenizer.json"), data.simulate())
    parts = generation(config, kind.itemsize), training(config)
    machine = Machine(device, kind)
    engines = {name: side for name, side in sides.items() if issubclass(side, Engine)}
    lines: list[dict] = []
    scores: dict[str, dict[str, dict]] = {}  # by name of the line and side
    peak: dict[str, dict[str, int]] = {}  # bytes, by name of the line and side
    with tempfile.TemporaryDirectory(prefix="qwen-min-benchmark-") as scratch:
        setup = Setup(str(folder), device, dtype, scratch, torch.get_num_threads(), contexts.ids, contexts.wide)
        with processes(setup, engines) as started:
            for name, process in started.items():
                ask(process, name, "prepare")
        for part in parts:
            with processes(setup, sides) as started:
                for work in part:
                    asked = {name: process for name, process in started.items() if work.engines or name not in engines}
                    if work.method == "peak":
                        peak[work.name] = {name: ask(process, name, "peak") for name, process in asked.items()}
                        continue
                    answers, limits = _in_turns(asked, work, runs, machine)
                    lines += _lines(work, answers, limits)
                    if work.method == "forecast":
                        scores |= _scores(work, answers, contexts)
    bandwidth = median(line["bandwidth"] for line in lines)
    return {
        "sides": list(sides),
        "lines": lines,
        "scores": scores,
        "growth": _growth([work for part in parts for work in part], lines, list(sides)),
        "peak": peak,
        "cache_read_seconds_per_position": position_bytes(config, kind.itemsize) / bandwidth,
    }


def _in_turns(
    asked: Mapping[str, ProcessPoolExecutor], work: Work, runs: int, machine: Machine
) -> tuple[dict[str, list], list[tuple[float, float]]]:
    """The answers of each side in each run, and the machine's limits before each round.

    The answers of a round before them, which warms up, are dropped. Forecasts have none, because they take minutes.
    """
    warm_up = 0 if work.method == "forecast" else 1
    answers: dict[str, list] = {name: [] for name in asked}
    limits = []
    for _ in range(warm_up + runs):
        limits.append(machine.limits())
        for name, process in asked.items():
            answers[name].append(ask(process, name, work.method, *work.values))
    return {name: each[warm_up:] for name, each in answers.items()}, limits


def _lines(work: Work, answers: Mapping[str, list], limits: Sequence[tuple[float, float]]) -> list[dict]:
    """Lines of the table. A side without constrained decoding stands there with free decoding."""
    named = {work.name: answers}
    if work.method == "forecast":
        others = " (others: free)" if len(answers) > 1 else ""
        named = {}
        for line, summed in FORECAST_LINES.items():
            named[f"{work.name}, {line}{others * ('constrained' in summed)}"] = {
                side: [sum(one.seconds.get(part, one.seconds["free"]) for part in summed) for one in each]
                for side, each in answers.items()
            }
    rate, bandwidth = (median(values) for values in zip(*limits, strict=True))
    for name, seconds in named.items():
        medians = ", ".join(f"{side} {median(times):.3f} s" for side, times in seconds.items())
        print(f"{name}: {medians}", file=sys.stderr, flush=True)
    limited = {"flops": work.flops, "bytes": work.bytes, "matrix_flops": rate, "bandwidth": bandwidth}
    return [
        {"name": name, "work": work.amount, "unit": work.unit, "seconds": seconds} | limited
        for name, seconds in named.items()
    ]


def _scores(work: Work, answers: Mapping[str, list[Completion]], contexts: Contexts) -> dict[str, dict[str, dict]]:
    """The errors of each way to decode in the last run, by side."""
    (steps,) = work.values
    return {
        f"{work.name}, {way}: validation MSE": {
            side: contexts.score(each[-1].texts[way], steps) for side, each in answers.items() if way in each[-1].texts
        }
        for way in ("free", "constrained")
    }


def _growth(works: Sequence[Work], lines: Sequence[dict], sides: Sequence[str]) -> dict[str, dict[str, dict]]:
    """How the median seconds of each side grow along each curve that it was measured on as a whole."""
    seconds = {line["name"]: line["seconds"] for line in lines}
    found: dict[str, dict[str, dict]] = {side: {} for side in sides}
    for curve in dict.fromkeys(work.curve for work in works if work.curve):
        points = {work.size: seconds[work.name] for work in works if work.curve == curve}
        for side in sides:
            if all(side in point for point in points.values()):
                found[side][curve] = growth([*points], [median(point[side]) for point in points.values()])
    return found


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Least-squares line of seconds over sizes (seconds_per_unit, start), and the exponent of a power law."""
    slope, start = np.polyfit(sizes, seconds, 1)
    exponent, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return {"seconds_per_unit": float(slope), "start": float(start), "exponent": float(exponent)}
