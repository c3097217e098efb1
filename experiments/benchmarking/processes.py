"""Runs each side of a benchmark in a process of its own. Imports no torch, because the engines' processes read it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any

from experiments.benchmarking.side import BenchmarkError, Setup, Side

_side: Side  # of this process


@contextmanager
def processes(setup: Setup, sides: Mapping[str, type[Side]]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A new process for each side, by name. It starts when it is first asked, and ends with this context."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(ProcessPoolExecutor(1, context, _start, (side, setup)))
            for name, side in sides.items()
        }


def ask(process: ProcessPoolExecutor, name: str, method: str, *values: int) -> Any:
    """What a method of the side in this process returns. Raises its errors, and BenchmarkError if the process died."""
    try:
        return process.submit(_call, method, values).result()
    except BrokenProcessPool as error:
        raise BenchmarkError(f"the process of {name} died in {method}; it may have run out of memory") from error


def _start(side: type[Side], setup: Setup) -> None:
    global _side
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    # a parent that is killed cannot end this process, which would keep its memory
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _side = side(setup)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _call(method: str, values: tuple[int, ...]) -> Any:
    return getattr(_side, method)(*values)
