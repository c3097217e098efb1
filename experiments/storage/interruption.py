"""Ctrl-C and SIGTERM, the signal of cluster schedulers, as an exception."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HELD = b"\nstopping after this step is saved; press Ctrl-C again to stop now\n"


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop; `exit_status` is what shells expect then."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class Interruption:
    """While entered, a request to stop raises Interrupted: at once, or within `held` when `check` is next called.

    A second request is never held back. Only the main thread can handle signals: in another one this does nothing.
    """

    def __init__(self):
        self.asked: int | None = None  # the signal's number
        self._holding = False

    def __enter__(self) -> "Interruption":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            asked = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in asked}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        again, self.asked = self.asked, number
        if again or not self._holding:
            raise Interrupted(number)
        os.write(2, HELD)  # print may be what is interrupted

    def check(self) -> None:
        """Raise Interrupted when a stop was asked for."""
        if self.asked:
            raise Interrupted(self.asked)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Work whose pieces are to be finished: it calls `check` between them."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self.check()
