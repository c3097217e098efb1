"""What each side of a benchmark can do, in a process of its own. Imports no torch: an engine would pay for its memory.

N prompts of T tokens that write D variables, h forecast steps.
"""

import multiprocessing
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.forecasting.encoding import Encoding

TOKENS_PER_STEP = 10  # a time step of two values is `1.23,4.56;`
DECODE_STEPS = 8  # the seconds of a decode step are the mean of so many


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked, or a side that failed."""


class Setup(NamedTuple):
    """What all sides are given: where to compute, and what to forecast, in the units of the data."""

    folder: str  # of the checkpoint
    device: str
    dtype: str
    scratch: str  # folder for files made of the checkpoint
    threads: int
    encoding: Encoding
    ids: list[list[int]]  # (N, T): the text of each context, which ends in `;`
    contexts: np.ndarray  # (N, time steps, D)
    truth: np.ndarray  # (N, h, D): what follows


class Side(ABC):
    """A program that is measured: `ask` times a method that returns no number, the others measure something themselves.

    It holds one model at a time, the one that it loaded last.
    """

    texts: list[str]  # of the last forecast

    def __init__(self, setup: Setup):
        self.setup, self.device = setup, setup.device

    @abstractmethod
    def start(self) -> None:
        """Load tokenizer and model."""

    @abstractmethod
    def complete(self, ids: list[list[int]], tokens: int) -> list[str]:
        """Continue prompts (N, T) greedily by so many tokens, past any end of the text."""

    @abstractmethod
    def decode(self, batch: int, context: int) -> float:
        """Seconds of a greedy decode step after `context` tokens, mean of DECODE_STEPS."""

    def load(self) -> None:
        self.start()
        self.prefill(1)

    def prefill(self, length: int) -> None:
        self.complete(self.tokens(1, length), 1)

    def free(self, steps: int) -> None:
        """Forecast `steps` time steps after each context by free text."""
        self.texts = self.complete(self.setup.ids, steps * TOKENS_PER_STEP)

    def mse(self, steps: int) -> float:
        """MSE of the last forecast in scaled units. The mean of the context stands in for a malformed value."""
        encoding, truth = self.setup.encoding, self.setup.truth[:, :steps]
        means = encoding.scaled(self.setup.contexts).mean(axis=1, keepdims=True)
        forecast = np.stack([encoding.decode(text, *truth.shape[1:]) for text in self.texts])
        return float(((np.where(np.isnan(forecast), means, forecast) - encoding.scaled(truth)) ** 2).mean())

    def peak(self) -> float:
        """The largest memory of this process so far, in GB."""
        status = Path("/proc/self/status")
        if status.exists():  # on Linux, ru_maxrss also counts the memory of the process that started this one
            return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes

    def tokens(self, batch: int, length: int) -> list[list[int]]:
        """Ids (batch, length) of numbers, `1.23,4.56;...`: the first context, over and over."""
        return [list(islice(cycle(self.setup.ids[0]), length))] * batch


@contextmanager
def processes(setup: Setup, sides: Mapping[str, type[Side]]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A new process for each side, by name. It starts when it is first asked, and ends with this context."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(ProcessPoolExecutor(1, context, _start, (side, setup)))
            for name, side in sides.items()
        }


def ask(process: ProcessPoolExecutor, name: str, method: str, *values: int) -> float:
    """The number that a method of the side in this process returns, or the seconds that it takes.

    Raises its errors, and BenchmarkError if the process died.
    """
    try:
        return process.submit(_call, method, values).result()
    except BrokenProcessPool as error:
        raise BenchmarkError(f"the process of {name} died in {method}; it may have run out of memory") from error


_side: Side  # of this process


def _start(side: type[Side], setup: Setup) -> None:
    global _side
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    # a parent that is killed cannot end this process, which would keep its memory
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    _side = side(setup)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _call(method: str, values: tuple[int, ...]) -> float:
    started = time.perf_counter()
    result = getattr(_side, method)(*values)
    return time.perf_counter() - started if result is None else result
