"""Reading untrusted files: refuses endless ones (pipes, devices) and implausibly large ones."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

MOST_BYTES = 256 * 2**20  # limit for files that are read whole; weights are memory-mapped
LONGEST_LINE = 2**22  # limit for a line of JSON, in bytes; ours have a few thousand


def check_file(file: str | Path, most_bytes: int = MOST_BYTES) -> int:
    """Check that a file is safe to open, and return its size in bytes.

    Folders pass, because opening them fails at once.

    Raises:
        InputError: the file is a pipe, a device or a socket, is larger than `most_bytes`, or has an
            invalid name.
        OSError: it is missing, or its folder can't be accessed.
    """
    try:
        status = os.stat(file)
    except ValueError:  # a NUL in the path, or a character that the file system can't encode
        raise InputError(f"{file}: not a valid path: correct it") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise InputError(f"{file}: a pipe or a device, not a file: save its contents as a file")
    if status.st_size > most_bytes:
        limit = f"{most_bytes // 2**20} MB"
        raise InputError(f"{file}: larger than the limit of {limit}: split or shrink it")
    return status.st_size


def read_bytes(file: str | Path) -> bytes:
    """The bytes of a file that `check_file` accepts."""
    size = check_file(file)
    with open(file, "rb") as opened:
        return opened.read(size)


def read_json(file: str | Path, remedy: str) -> Any:
    """The value of a JSON file. Any failure is an InputError that ends with `remedy`."""
    try:
        return json.loads(read_bytes(file).decode("utf-8-sig"), object_pairs_hook=_object)
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:  # RecursionError: deeply nested brackets
        raise InputError(f"{file}: not readable as JSON ({error}); {remedy}") from None


def read_json_lines(
    file: str | Path, remedy: str, skip_torn: bool = True
) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) for each line of a JSON lines file of any length.

    Blank lines are skipped, and with `skip_torn` also a truncated last line, as a crash leaves it.
    Any other failure is an InputError that ends with `remedy`.
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
                        return  # the truncated last line
                    raise InputError(
                        f"{file} line {number}: not JSON ({error}); {remedy}"
                    ) from None
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}); {remedy}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a field appears twice: parsers disagree on which one counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the field {repeated!r} appears twice")
    return fields
