"""Processes that start at once: forked from a server that has imported the project and done nothing else."""

import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults", "torch._dynamo"])


def start(log: Path, work: Callable[..., int], *arguments, size: int = 1) -> list[BaseProcess]:
    """Start processes whose exit status is work(*arguments), with the variables that torchrun sets.

    What they print is appended to the file `log`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    processes = [SERVER.Process(target=_work, args=(log, rank, work, arguments)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[BaseProcess], seconds: int = 600) -> int:
    """The first exit status that is not 0, or minus the signal that ended it; what takes longer is killed."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return next((process.exitcode for process in processes if process.exitcode), 0)


def run(log: Path, work: Callable[..., int], *arguments, size: int = 1) -> int:
    """`start` and `wait`."""
    return wait(start(log, work, *arguments, size=size))


def _work(log: Path, variables: dict[str, str], work: Callable[..., int], arguments: tuple) -> None:
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own lock would be told to be leaked where a process is killed
    torch.set_num_threads(1)
    os.environ |= variables
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(work(*arguments))
