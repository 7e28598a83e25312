"""How a program ends: turns exceptions into a line on the terminal and an exit code."""

import os
import sys
from collections.abc import Callable

import torch

from .errors import InputError, printable


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means out of memory, in Python or torch, on the CPU or the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On the CPU, torch has no exception class for it.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Stopped(BaseException):
    """Ends the program because of a signal. Not an Exception, so that no library swallows it."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def run_program(name: str, work: Callable[[], object], when_stopped: str = "stopped") -> int:
    """Run a program's `work`, and return the exit code; errors are one line on stderr.

    0: done; 2: an error that the user can fix; 130: stopped by Ctrl-C, which prints
    `when_stopped`; for other signals 128 + their number, as in shells.
    """
    try:
        work()
        sys.stdout.flush()  # here, so that a closed pipe is handled below
    except BrokenPipeError:  # the reader may exit early, as `head` does
        # The interpreter flushes stdout once more at exit, and would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not (isinstance(error, InputError | OSError) or out_of_memory(error)):
            raise  # a bug: keep its traceback
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
    """One line for an error that the user can fix: names the cause and the remedy."""
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or error
        return printable(f"{file}{reason}; fix it and run the same command again")
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of memory on the GPU; set offload_optimizer or lower eval_batch_prompts, or start "
            "again in another run_dir with a lower prompts_per_step, group_size or max_new_tokens"
        )
    if out_of_memory(error):
        return "out of memory on this machine; lower prompts_per_step, group_size or max_new_tokens"
    return str(error)
