"""What each side of a benchmark can do. Imports no torch: an engine without it would pay for it in memory.

B rows of a batch, T tokens of a prompt, D variables.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

OURS = "qwen-min"
TOKENS_PER_STEP = 10  # a time step of two values is `1.23,4.56;`
DECODE_STEPS = 8  # the seconds of a decode step are the mean of so many


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked, or a side that failed."""


class Setup(NamedTuple):
    """What all sides are given."""

    folder: str  # of the checkpoint
    device: str
    dtype: str
    scratch: str  # folder for files made of the checkpoint
    threads: int
    ids: list[list[int]]  # (B, T), contexts to forecast from; each ends in `;`
    wide: list[list[bool]]  # (B, D), the variables that may need a second digit, see `Grammar.follow`


class Completion(NamedTuple):
    """What a side made of a batch. Ways to decode are "free" (greedy) and "constrained" (by a grammar)."""

    seconds: dict[str, float]  # "prefill", until each prompt has its first token; by way to decode, the rest
    texts: dict[str, list[str]]  # by way to decode, one for each prompt


class Side(ABC):
    """A program that is measured. It holds one model at a time, the one that it loaded last."""

    packages: tuple[str, ...] = ()  # what it needs besides this project

    def __init__(self, setup: Setup):
        self.setup = setup

    @abstractmethod
    def start(self) -> None:
        """Load tokenizer and model. The model loaded before is dropped first."""

    @abstractmethod
    def complete(self, ids: list[list[int]], tokens: int) -> Completion:
        """Continue prompts (B, T) greedily by so many tokens, past any end of the text."""

    def load(self) -> float:
        """Seconds to load, and to compute the logits of a first token."""

        def run() -> None:
            self.start()
            self.complete(self.tokens(1, 1), 1)

        return seconds_of(run, self.setup.device)

    def prefill(self, length: int) -> float:
        """Seconds to prefill a cache with one prompt of `length` tokens."""
        return self.complete(self.tokens(1, length), 1).seconds["prefill"]

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a greedy decode step after `context` tokens, mean of DECODE_STEPS."""
        return self.complete(self.tokens(batch, context), 1 + DECODE_STEPS).seconds["free"] / DECODE_STEPS

    def forecast(self, steps: int) -> Completion:
        """Forecast `steps` time steps after each context."""
        return self.complete(self.setup.ids, steps * TOKENS_PER_STEP)

    def peak(self) -> int:
        """Largest number of bytes that this process had in memory so far."""
        status = Path("/proc/self/status")
        if status.exists():
            # Linux; ru_maxrss, below, also counts the memory of the process that started this one
            (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
            return int(line.split()[1]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def tokens(self, batch: int, length: int) -> list[list[int]]:
        """Ids (batch, length) of numbers, `1.23,4.56;...`: the first context, over and over."""
        return [list(islice(cycle(self.setup.ids[0]), length))] * batch


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Seconds that a call takes, including its work on a torch device."""

    def wait() -> None:
        if device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started
