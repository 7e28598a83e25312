"""The request to stop (Ctrl-C, SIGTERM or SIGHUP), obeyed where nothing is lost by it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from common.program import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what schedulers send, and what a closed terminal sends."""


class StopRequest:
    """A request to stop the run: within `listening`, `SIGNALS` are noted, and `check` obeys them.

    While it is `deferred`, `check` lets the run go on.
    """

    def __init__(self) -> None:
        self.signal = 0  # none so far
        # A step changes nothing but gradients until its first update: up to there it may be left
        # and done anew on resuming. From then on it is half done, and must be finished first.
        self.deferred = False
        self._handlers: dict[int, signal.Handlers] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the first signal is noted, and a second one stops at once."""
        for number in SIGNALS:
            # What is ignored already stays so: nohup ignores SIGHUP, for the run to outlive it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)  # type: ignore
        try:
            yield
        finally:
            self._restore_handlers()

    def check(self) -> None:
        """Raise Stopped if a stop was requested and is not deferred."""
        if self.signal and not self.deferred:
            raise Stopped(self.signal, "stopped")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        message = b"\nstopping where nothing is lost, with a checkpoint; once more stops at once\n"
        with suppress(OSError):  # the terminal may be gone
            # Not print: the signal may have interrupted one, and streams can't be entered twice.
            os.write(2, message)
        # A user who presses Ctrl-C twice means it: the second signal finds the old handlers.
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler where there is nothing to save: raises Stopped wherever the program is."""
    place = "the last checkpoint, if there is one"
    raise Stopped(number, f"stopped at once; the same command goes on from {place}")
