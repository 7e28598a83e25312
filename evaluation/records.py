"""What an evaluation has found so far, on disk row by row: a killed one goes on where it
stopped.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from common.errors import InputError

Key = tuple[str, str, int]
Row = dict[str, Any]


class Records:
    """A file of JSON lines that only grows. A row is known by its model, its probe and its
    question's place among all, and holds the hash of the contract (under which a place is a
    question) and the digest of the model.

    Rows of a model that has changed since are dropped, and counted in `dropped`; so is a last row
    that a crash has cut. Anything else that can't be read is an InputError: nothing of value is
    thrown away in silence.
    """

    def __init__(self, path: Path, contract: str, digests: dict[str, str]) -> None:
        self.contract, self.digests, self.dropped = contract, digests, 0
        self.rows: dict[Key, Row] = {}
        kept = []
        for row in read_rows(path) if path.exists() else []:
            if row["contract"] != contract:
                raise InputError(
                    f"{path}: holds rows under another contract; delete it to begin anew"
                )
            if row["digest"] == digests.get(row["model"], row["digest"]):
                self.rows[_key(row)] = row
                kept.append(_line(row))
            else:
                self.dropped += 1
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(b"".join(kept))
            os.replace(partial, path)
            self._file = path.open("ab")
        except OSError as error:
            raise InputError(
                f"{path}: can't be written ({error.strerror}); choose another --out"
            ) from None

    def missing(self, model: str, probe: str, total: int) -> list[int]:
        """The places, of `total`, that have no row yet."""
        return [place for place in range(total) if (model, probe, place) not in self.rows]

    def of(self, model: str, probe: str, total: int) -> list[Row]:
        """The rows of all `total` places, in order. KeyError if one is missing."""
        return [self.rows[model, probe, place] for place in range(total)]

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, each with "model", "probe" and "place", and hand them to the system."""
        for row in rows:
            row = {**row, "contract": self.contract, "digest": self.digests[row["model"]]}
            self.rows[_key(row)] = row
            self._file.write(_line(row))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of such a file, without a last one that a crash has cut. InputError if it holds
    anything else.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"{path}: can't be read ({error.strerror}); run evaluate.py, or choose another folder"
        ) from None
    return [_parsed(path, number, line) for number, line in enumerate(lines[:-1], start=1)]


def _line(row: Row) -> bytes:
    # A lone surrogate, which JSON may hold and UTF-8 may not, becomes its \\u escape: JSON again.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _key(row: Row) -> Key:
    return row["model"], row["probe"], row["place"]


def _parsed(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        typed = all(
            isinstance(row[field], str) for field in ("model", "probe", "contract", "digest")
        )
        if typed and isinstance(row["place"], int) and ("letter" in row or "letters" in row):
            return row
        reason = "a field is missing or of the wrong type"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InputError(
        f"{path} line {number}: not a row of an evaluation ({reason}); delete the file to begin anew"
    )
