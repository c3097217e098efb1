"""Runs each side of a benchmark in a process of its own."""

import multiprocessing
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from experiments.benchmarking.side import BenchmarkError, Setup, Side


def serve(side: type[Side], setup: Setup, connection: Connection) -> None:
    """Call the method that each message (name, arguments) asks for and send its result, until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    worker = side(setup)
    while True:
        try:
            name, values = connection.recv()
        except EOFError:
            return
        connection.send(getattr(worker, name)(*values))


def prepare(setup: Setup, sides: Mapping[str, type[Side]]) -> None:
    """Let each side make the files that it reads, in a process whose memory is not measured."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for side in sides.values():
            pool.submit(side.prepare, setup).result()


class Processes:
    """One process for each side; in `ask` they take turns."""

    def __init__(self, setup: Setup, sides: Mapping[str, type[Side]]):
        context = multiprocessing.get_context("spawn")
        self.sides = sides
        self.connections: dict[str, Connection] = {}
        self.processes: list[BaseProcess] = []
        for name, side in sides.items():
            self.connections[name], theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(side, setup, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()

    def ask(
        self,
        method: str,
        *values: object,
        runs: int = 1,
        warm_up: int = 0,
        between: Callable[[], None] = lambda: None,
    ) -> dict[str, list]:
        """Ask in turn all sides that can answer, `runs` times; return the answers by side.

        The answers of `warm_up` runs before them are dropped. `between` is called once before each round. Raises
        BenchmarkError when a process died.
        """
        asked = {name: each for name, each in self.connections.items() if self.sides[name].can(method, *values)}
        answers: dict[str, list] = {name: [] for name in asked}
        for _ in range(warm_up + runs):
            between()
            for name, connection in asked.items():
                connection.send((method, values))
                try:
                    answers[name].append(connection.recv())
                except EOFError:
                    raise BenchmarkError(f"the process of {name} died in {method}, see above") from None
        return {name: each[warm_up:] for name, each in answers.items()}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes and free their memory."""
        for connection in self.connections.values():
            connection.close()
        for process in self.processes:
            process.join()
