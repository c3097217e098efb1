"""What is timed: a list for generation and one for training; and what is forecast."""

from typing import NamedTuple

from experiments.benchmarking.side import DECODE_STEPS, Side
from experiments.benchmarking.torch_sides import Ours, TorchSide

CONTEXT = 699  # tokens in a forecasting prompt
CONTEXTS = 10  # prompts in a batch of forecasts
BATCHES = (10, 64)  # of decode steps, besides one text
FORECAST_STEPS = 10
GROWN_CONTEXT = 8192  # filled positions of a decode step
TRAINED = ((4, 512), (4, 768))  # rows and tokens of LoRA steps


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
