"""Files from outside, read whole: none that could go on for ever, or that is larger than any real one, is begun."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import InputError

MOST_BYTES = 256 * 2**20  # the largest file that is read into memory; weights are not, they are mapped


def check_file(file: str | Path) -> int:
    """Refuse what must not be opened, or give its size in bytes. A folder passes: opening it fails at once.

    Raises:
        InputError: the file is a pipe, a device or a socket, is larger than `MOST_BYTES`, or has an impossible name.
        OSError: it is missing, or its folder can't be looked into.
    """
    try:
        status = os.stat(file)
    except ValueError:  # a NUL in the path, or a character that the file system can't have
        raise InputError(f"{file}: no possible path: correct it") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise InputError(f"{file}: a pipe or a device, not a file: save its contents as a file")
    if status.st_size > MOST_BYTES:
        limit = f"{MOST_BYTES // 2**20} MB"
        raise InputError(f"{file}: larger than {limit}, which is not read: split or shrink it")
    return status.st_size


def read_bytes(file: str | Path) -> bytes:
    """The file's bytes, as many as it has when it is checked. Raises what `check_file` does."""
    size = check_file(file)
    with open(file, "rb") as opened:
        return opened.read(size)


def read_json(file: str | Path, remedy: str) -> Any:
    """The value of a JSON file; `remedy` ends the InputError that is raised whatever hinders that."""
    try:
        return json.loads(read_bytes(file).decode("utf-8"))
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); {remedy}") from None
