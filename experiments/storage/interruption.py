"""Turn Ctrl-C and SIGTERM (the signal of cluster schedulers) into an exception."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_NOTICE = b"\nstopping after this step is saved; press Ctrl-C again to stop now\n"


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop. `exit_status` is the status that shells expect for the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class Interruption:
    """A context in which a request to stop raises Interrupted.

    It is raised at once, or inside `held` at the next call of `check`. A second request always raises at once. Only the
    main thread can handle signals: in another thread the context does nothing.
    """

    def __init__(self):
        self.asked: int | None = None  # the number of the signal that asked to stop
        self._holding = False

    def __enter__(self) -> "Interruption":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            handled = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        asked_before, self.asked = self.asked, number
        if asked_before or not self._holding:
            raise Interrupted(number)
        os.write(2, STOP_NOTICE)  # not print, because the signal may have interrupted a print

    def check(self) -> None:
        """Raise Interrupted if the process was asked to stop."""
        if self.asked:
            raise Interrupted(self.asked)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context for work that must not stop in the middle of a piece; the work calls `check` between its pieces."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self.check()
