"""Stopping on Ctrl-C, SIGTERM or SIGHUP, at a point where no work is lost."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from common.program import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the signal of schedulers, and the signal of a closed terminal."""


class StopRequest:
    """A request to stop the run: set by a signal within `listening`, obeyed by `check`.

    While `deferred` is set, `check` does nothing. Unless this process is `alone`, only `agree`
    stops: a process that stops by itself would leave the others waiting.
    """

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone
        self.signal = 0  # none so far
        self.agreed = False  # whether all processes have stopped, after the same step
        # Until its first update, a step changes only gradients: it can be abandoned, and repeated
        # when the run is resumed. After that, it must be finished first.
        self.deferred = False
        self._handlers: dict[int, signal.Handlers] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle `SIGNALS`: the first requests a stop, a second one stops at once."""
        for number in SIGNALS:
            # An ignored signal stays ignored: under nohup, the run must survive SIGHUP.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)  # type: ignore
        try:
            yield
        finally:
            self._restore_handlers()

    def check(self) -> None:
        """Raise Stopped if a stop was requested and is not deferred."""
        if self.signal and self.alone and not self.deferred:
            raise Stopped(self.signal, "stopped")

    def agree(self, gather: Callable[[int], Sequence[int]]) -> None:
        """Raise Stopped in all processes if one of them was requested to stop."""
        signal = max(gather(self.signal))  # not kept: one may arrive meanwhile
        if signal:
            self.agreed = True
            raise Stopped(signal, "stopped")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        message = b"\nstopping as soon as a checkpoint is saved; a second signal stops at once\n"
        with suppress(OSError):  # the terminal may be gone
            # Not print: the signal may have interrupted one, and streams are not reentrant.
            os.write(2, message)
        # So that a second Ctrl-C stops at once.
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler for when there is nothing to save: raises Stopped immediately."""
    place = "the last checkpoint, if there is one"
    raise Stopped(number, f"stopped at once; the same command resumes from {place}")
