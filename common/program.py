"""How a program ends: one ladder from an exception to a line on the terminal and an exit code."""

import os
import sys
from collections.abc import Callable

import torch

from .errors import InputError, printable


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: Python's, the GPU's, or torch's on the processor."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for it.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Stopped(BaseException):
    """A program ends because a signal asked it to. Not an Exception: no library swallows it."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def run_program(name: str, work: Callable[[], object], when_stopped: str = "stopped") -> int:
    """Do a program's work; what is wrong is one line on stderr that names the thing and the remedy.

    Returns the exit code: 0 done; 2 something must be mended; 130 stopped by Ctrl-C, and what
    shells report for other signals (128 + number). `when_stopped` is what Ctrl-C prints.
    """
    try:
        work()
        sys.stdout.flush()  # here, so that a pipe without a reader is noticed within the ladder
    except BrokenPipeError:  # who reads a pipe may leave early, as `head` does
        # The interpreter flushes once more when it ends, and would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not (isinstance(error, InputError | OSError) or out_of_memory(error)):
            raise  # a bug of ours: its traceback is worth more than a line
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"{name}: {when_stopped}", file=sys.stderr)
        return 130
    return 0


def one_line(error: Exception) -> str:
    """An error that comes from outside as one line that names the thing and the remedy."""
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or error
        return printable(f"{file}{reason}; mend it, and the same command goes on")
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of memory on the GPU; set offload_optimizer or lower eval_batch_prompts, or begin "
            "anew in another run_dir with a smaller prompts_per_step, group_size or max_new_tokens"
        )
    if out_of_memory(error):
        return "out of memory on this machine; lower prompts_per_step, group_size or max_new_tokens"
    return str(error)
