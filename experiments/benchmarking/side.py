"""What each side of a benchmark can be asked. Imports no torch: an engine without it would pay for it in memory.

B rows of a batch, T tokens of a prompt, D variables.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

CONTEXT = 699  # tokens in a forecasting prompt
CONTEXTS = 10  # prompts in a batch of forecasts
TOKENS_PER_STEP = 10  # a time step of two values is `1.23,4.56;`
FORECAST_STEPS = (10, 30)
DECODE_STEPS = 8
OURS = "qwen-min"


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked, or a side that failed."""


class Setup(NamedTuple):
    """What all sides are given."""

    folder: str  # of the checkpoint
    device: str
    dtype: str
    scratch: str  # folder for files that a side makes of the checkpoint
    threads: int


class Prompts(NamedTuple):
    """Contexts to forecast from."""

    ids: list[list[int]]  # (B, T), each ends in `;`
    wide: list[list[bool]]  # (B, D), the variables that may need a second digit, see `Grammar.follow`


class Forecast(NamedTuple):
    """Seconds and texts of forecasts. The keys of both are ways to decode: "free" (greedy), "constrained" (grammar)."""

    prefill: float
    decoding: dict[str, float]
    texts: dict[str, list[str]]


def seconds_of(function: Callable[[], object], device: str = "cpu") -> float:
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


class Side:
    """A program that is measured. It holds one model at a time, the one that it loaded last.

    Each method that a class adds can be asked for; a side is not asked for what it has not.
    """

    def __init__(self, setup: Setup):
        self.setup = setup

    @classmethod
    def prepare(cls, setup: Setup) -> None:
        """Make the files in `scratch` that this side reads. Runs once, in a process of its own."""

    @classmethod
    def can(cls, method: str, *values: object) -> bool:
        """True if this side has the method and takes these values."""
        return hasattr(cls, method)

    def numbers(self, batch: int, length: int) -> list[list[int]]:
        """Tokens of random numbers, `1.23,4.56;...`, (batch, length)."""
        ids = np.random.default_rng(0).integers(15, 25, (batch, length))  # ids of the digits
        for place, token in ((1, 13), (4, 11), (6, 13), (9, 26)):  # `.` `,` `.` `;`
            ids[:, place::TOKENS_PER_STEP] = token
        return ids.tolist()

    def peak(self) -> int:
        """Largest number of bytes that this process had in memory so far."""
        status = Path("/proc/self/status")
        if status.exists():
            # Linux; ru_maxrss, below, also counts the memory of the process that started this one
            (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
            return int(line.split()[1]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Completion(NamedTuple):
    """What an engine made of a batch of prompts."""

    texts: list[str]
    prefill: float  # seconds, until every prompt has its first token
    decoding: float  # seconds, the rest


class Engine(Side, ABC):
    """An engine that runs greedy decoding on a CPU and cannot train. It reads GGUF files made of the checkpoint."""

    weights: str  # as `write_gguf` takes it

    @classmethod
    def can(cls, method: str, *values: object) -> bool:
        """An engine has no cache that can be filled: it would have to read each long context anew."""
        if method == "decode":
            return values == (1, CONTEXT)
        return super().can(method) and (method != "forecast" or values[-1] == min(FORECAST_STEPS))

    @classmethod
    def file(cls, setup: Setup) -> Path:
        """The GGUF file of these weights, in a folder of its own."""
        return Path(setup.scratch) / f"{cls.__name__}-{cls.weights}" / "model.gguf"

    @classmethod
    def prepare(cls, setup: Setup) -> None:
        from experiments.benchmarking.gguf_file import write_gguf

        cls.file(setup).parent.mkdir()
        write_gguf(Path(setup.folder), cls.file(setup), cls.weights)

    @abstractmethod
    def start(self) -> None:
        """Load the model. The one loaded before is dropped first."""

    @abstractmethod
    def complete(self, ids: list[list[int]], tokens: int) -> Completion:
        """Continue prompts (B, T) of equal length greedily by so many tokens, past any end of the text."""

    def load(self) -> float:
        """Seconds to load and to compute the logits of a first token."""

        def run() -> None:
            self.start()
            self.complete(self.numbers(1, 1), 1)

        return seconds_of(run)

    def prefill(self, length: int) -> float:
        """Seconds to prefill a cache with one prompt of `length` tokens."""
        return self.complete(self.numbers(1, length), 1).prefill

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a greedy decode step after `context` tokens, mean of DECODE_STEPS."""
        return self.complete(self.numbers(batch, context), 1 + DECODE_STEPS).decoding / DECODE_STEPS

    def forecast(self, prompts: Prompts, steps: int) -> Forecast:
        """Forecast `steps` time steps of ten tokens after each prompt."""
        done = self.complete(prompts.ids, steps * TOKENS_PER_STEP)
        return Forecast(done.prefill, {"free": done.decoding}, {"free": done.texts})
