"""What is timed: a list for generation and one for training. All sides are asked in turn for each piece of work."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from experiments.benchmarking.engines import Engine, LlamaCpp, LlamaCppQ8, OpenVINO, OpenVINOQ8
from experiments.benchmarking.side import DECODE_STEPS, TOKENS_PER_STEP, BenchmarkError, Setup, Side, ask, processes
from experiments.benchmarking.torch_sides import Ours, TorchSide, Transformers
from experiments.forecasting.encoding import Encoding
from experiments.study import data
from qwen_min import QwenConfig, Tokenizer

CONTEXT = 699  # tokens in a forecasting prompt
CONTEXTS = 10  # prompts in a batch of forecasts
BATCHES = (10, 64)  # of decode steps, besides one text
FORECAST_STEPS = 10
GROWN_CONTEXT = 8192  # filled positions of a decode step
TRAINED = ((4, 512), (4, 768))  # rows and tokens of LoRA steps
OURS = "qwen-min"
PEERS: dict[str, tuple[tuple[str, ...], dict[str, type[Side]]]] = {  # packages, and sides by their names in the table
    "transformers": (("transformers", "peft"), {"transformers": Transformers}),
    "llama.cpp": (("xllamacpp", "gguf"), {"llama.cpp bf16": LlamaCpp, "llama.cpp Q8_0": LlamaCppQ8}),
    "openvino": (("openvino_genai", "gguf"), {"OpenVINO fp16": OpenVINO, "OpenVINO Q8_0": OpenVINOQ8}),
}
LEGEND = f"""
A cell is the median; in brackets, how many times {OURS}'s. spread: the largest of a side in the line, largest minus
smallest run over the median. -: not measured, mostly because the side cannot do it. In an MSE, the mean of the context
stands in for a malformed value."""


class Work(NamedTuple):
    """A piece of work, which is a line of the table."""

    name: str
    method: str  # of the sides
    values: tuple[int, ...] = ()
    asked: type = Side  # the class of the sides that are asked
    unit: str = "s"  # of what the method returns; empty if it is no cost. Only seconds are measured repeatedly
    warm_up: int = 1  # runs that are dropped


def generation(positions: int, short: bool) -> list[Work]:
    """Loading, prefill, decode steps, unless short forecasts and the memory of all that; for so many positions.

    An engine has no cache that can be filled: it would have to read each long context anew. Forecasts take minutes and
    have no warm-up.
    """
    works = [
        Work("load, to the first logits", "load"),
        Work(f"prefill, {CONTEXT} tokens", "prefill", (CONTEXT,)),
        Work("decode step, batch 1", "decode", (1, CONTEXT)),
    ]
    if positions >= GROWN_CONTEXT + 1 + DECODE_STEPS:
        works.append(Work(f"decode step, context {GROWN_CONTEXT}", "decode", (1, GROWN_CONTEXT), TorchSide))
    works += [Work(f"decode step, batch {batch}", "decode", (batch, CONTEXT), TorchSide) for batch in BATCHES]
    if not short:
        for way, asked in (("free", Side), ("constrained", Ours)):
            name = f"{CONTEXTS} contexts + {FORECAST_STEPS} time steps, {way}"
            works.append(Work(name, way, (FORECAST_STEPS,), asked, warm_up=0))
            works.append(Work(f"{name}: validation MSE", "mse", (FORECAST_STEPS,), asked, unit=""))
        works.append(Work("peak memory, generation", "peak", unit="GB"))
    return works


def training() -> list[Work]:
    """LoRA steps, and their memory."""
    *steps, largest = [Work(f"LoRA step, {b} x {length}", "lora_step", (b, length), TorchSide) for b, length in TRAINED]
    return [*steps, Work(f"peak memory, {steps[-1].name}", "peak", asked=TorchSide, unit="GB"), largest]


def chosen(names: str, device: str) -> dict[str, type[Side]]:
    """The sides of this project and of peers, by their names in the table.

    names: "none", "all", or names separated by commas; BenchmarkError for a name that is none. A peer that is not
    installed or does not run on the device is left out, and a line says so.
    """
    sides: dict[str, type[Side]] = {OURS: Ours}
    for name in {"none": [], "all": list(PEERS)}.get(names, names.split(",")):
        if name not in PEERS:
            raise BenchmarkError(f"--peers names {name!r}, expected all, none, or some of {','.join(PEERS)}")
        packages, its_sides = PEERS[name]
        if missing := [package for package in packages if find_spec(package) is None]:
            print(f'{name} is left out, it needs {missing[0]}: pip install "qwen-min[peers]"', file=sys.stderr)
        elif device != "cpu" and any(issubclass(side, Engine) for side in its_sides.values()):
            print(f"{name} is left out, it is measured on the CPU only, got --device {device}", file=sys.stderr)
        else:
            sides |= its_sides
    return sides


def setup_of(folder: Path, device: str, dtype: str, scratch: str, series: np.ndarray) -> Setup:
    """What all sides are given: the checkpoint in `folder`, and the first validation series of a data set.

    Raises BenchmarkError when the tokenizer needs another number of tokens than CONTEXT and a `;`.
    """
    tokenizer = Tokenizer(folder / "tokenizer.json")
    parts, steps = data.split(len(series)), (CONTEXT + 1) // TOKENS_PER_STEP
    encoding = Encoding.fit(series[parts.train])
    contexts, truth = np.split(series[parts.val[:CONTEXTS]], [steps], axis=1)
    ids = [tokenizer.encode(encoding.encode(one) + ";") for one in contexts]
    if wrong := [len(row) for row in ids if len(row) != CONTEXT + 1]:
        raise BenchmarkError(
            f"the tokenizer makes {wrong[0]} tokens of {steps} time steps, expected {CONTEXT + 1}: one for each "
            "character, as Qwen2.5's does"
        )
    return Setup(str(folder), device, dtype, scratch, torch.get_num_threads(), encoding, ids, contexts, truth)


def measure(
    folder: Path, device: str, dtype: str, runs: int, sides: Mapping[str, type[Side]], short: bool = False
) -> Iterator[str]:
    """Measure everything, `runs` times. Yield the lines of a table in Markdown, with a column for each side.

    short: no forecasts, and no memory but that of training.
    """
    config = QwenConfig.from_file(folder / "config.json")
    with tempfile.TemporaryDirectory(prefix="qwen-min-benchmark-") as scratch:
        setup = setup_of(folder, device, dtype, scratch, data.simulate())
        engines = {name: side for name, side in sides.items() if issubclass(side, Engine)}
        with processes(setup, engines) as started:
            for name, process in started.items():
                ask(process, name, "prepare")
        yield "| " + " | ".join(["", *sides, "spread"]) + " |"
        yield "|" + " --- |" * (len(sides) + 2)
        for part in generation(config.max_position_embeddings, short), training():
            with processes(setup, sides) as started:
                for work in part:
                    asked = {name: started[name] for name, side in sides.items() if issubclass(side, work.asked)}
                    numbers: dict[str, list[float]] = {name: [] for name in asked}
                    for _ in range(work.warm_up + runs if work.unit == "s" else 1):
                        for name, process in asked.items():
                            numbers[name].append(ask(process, name, work.method, *work.values))
                    yield row(work, {name: each[-runs:] for name, each in numbers.items()}, list(sides))
    yield LEGEND


def row(work: Work, found: Mapping[str, list[float]], sides: list[str]) -> str:
    """A line of the table. found: the numbers of each run, by side."""
    medians, cells = {side: median(numbers) for side, numbers in found.items()}, [work.name]
    for side in sides:
        times = f" ({medians[side] / medians[OURS]:.2f} x)" if work.unit and side in medians and side != OURS else ""
        cells.append(f"{medians[side]:.4g} {work.unit}".strip() + times if side in medians else "-")
    spread = max((max(numbers) - min(numbers)) / medians[side] for side, numbers in found.items())
    return "| " + " | ".join([*cells, f"{spread:.0%}" if work.unit == "s" else "-"]) + " |"
