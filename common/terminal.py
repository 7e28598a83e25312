"""What a program says at its end, and to whom: a run does not end because its terminal has."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch

from .errors import printable


class _Patient:
    """A stream whose reader may go away (`| tee` killed, a connection lost): what can't be written
    is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass  # dropped, as above

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_output() -> Iterator[None]:
    """Within, stdout and stderr never raise."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Patient, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def said(error: Exception) -> str:
    """An error that comes from outside as one line that names the thing and the remedy."""
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return printable(f"{named}{error.strerror or error}; mend it, and the same command goes on")
    if isinstance(error, MemoryError):
        return "out of memory on this machine; lower prompts_per_step, group_size or max_new_tokens"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the GPU; lower eval_batch_prompts or micro_batch_tokens, or set offload_optimizer"
    return str(error)
