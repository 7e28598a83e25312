"""The request to stop: Ctrl-C, SIGTERM or SIGHUP, obeyed where nothing is lost by it."""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Self


class Stopped(BaseException):
    """A run ends because it was asked to; `signal` is what asked. Not an Exception: nobody handles
    it by accident.
    """

    def __init__(
        self,
        number: int,
        message: str = "stopped; the same command goes on from the last checkpoint, if there is one",
    ) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """What shells report for a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM,
        129 for SIGHUP.
        """
        return 128 + self.signal


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what schedulers send, and what a terminal sends that is closed."""


class StopRequest:
    """While it is entered, `SIGNALS` are taken down, and `check` obeys; a second one stops at once.

    A step changes nothing but gradients until its first update: up to there it may be left at any
    micro-batch and is done anew on resuming. From then on (`deferred`) it must come to its end
    first.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.deferred = False

    def __enter__(self) -> Self:
        heard = [
            number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
        ]  # nohup's is ignored
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        # Not print: the signal may have come in the middle of one, and streams can't be entered
        # twice.
        with suppress(OSError):  # nobody may be there to read it
            os.write(
                2,
                b"\nstopping after this micro-batch, with a checkpoint; once more stops at once\n",
            )
        for again, handler in self._before.items():
            signal.signal(again, handler)

    def check(self) -> None:
        """Raise Stopped if a stop was asked for and nothing speaks against it."""
        if self.asked and not self.deferred:
            raise Stopped(self.asked)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM and SIGHUP where there is nothing to save: the program ends in order,
    and says so.
    """
    raise Stopped(number)
