"""Files from outside: nothing is opened that could go on for ever, or read that is larger than any
real one.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

MOST_BYTES = 256 * 2**20  # the largest file that is read whole; weights are not, they are mapped
LONGEST_LINE = 2**22  # bytes of a line of JSON; a row of ours has a few thousand


def check_file(file: str | Path, most_bytes: int = MOST_BYTES) -> int:
    """Refuse what must not be opened, or return its size in bytes. A folder passes: opening it
    fails at once.

    Raises:
        InputError: the file is a pipe, a device or a socket, is larger than `most_bytes`, or has an
            impossible name.
        OSError: it is missing, or its folder can't be looked into.
    """
    try:
        status = os.stat(file)
    except ValueError:  # a NUL in the path, or a character that the file system can't have
        raise InputError(f"{file}: no possible path: correct it") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise InputError(f"{file}: a pipe or a device, not a file: save its contents as a file")
    if status.st_size > most_bytes:
        limit = f"{most_bytes // 2**20} MB"
        raise InputError(f"{file}: larger than {limit}, which is not read: split or shrink it")
    return status.st_size


def read_bytes(file: str | Path) -> bytes:
    """The file's bytes, as many as it has when it is checked. Raises what `check_file` does."""
    size = check_file(file)
    with open(file, "rb") as opened:
        return opened.read(size)


def read_json(file: str | Path, remedy: str) -> Any:
    """The value of a JSON file; `remedy` ends the InputError that is raised whatever hinders
    that.
    """
    try:
        return json.loads(read_bytes(file).decode("utf-8-sig"), object_pairs_hook=_object)
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:  # RecursionError: brackets 100,000 deep
        raise InputError(f"{file}: not readable as JSON ({error}); {remedy}") from None


def read_json_lines(
    file: str | Path, remedy: str, skip_torn: bool = True
) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) of a file of JSON lines, however long; blank lines are
    passed over.

    A last line that is torn, as a crash leaves it, is passed over too with `skip_torn`. `remedy`
    ends the InputError that anything else is which can't be read.
    """
    try:
        check_file(file, most_bytes=2**63)
        with open(file, "rb") as lines:
            number = 0
            while line := lines.readline(LONGEST_LINE):
                number += 1
                try:
                    if line.strip():
                        text = line.decode("utf-8-sig")
                        yield number, json.loads(text, object_pairs_hook=_object)
                except (ValueError, RecursionError) as error:
                    if skip_torn and not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                        return  # torn
                    raise InputError(
                        f"{file} line {number}: not JSON ({error}); {remedy}"
                    ) from None
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}); {remedy}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError if a field stands twice: readers disagree on which counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the field {twice!r} stands there twice")
    return fields
