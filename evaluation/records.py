"""What an evaluation has found so far, on disk row by row: a killed one goes on where it stopped."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from model import InputError

Key = tuple[str, str, str]
Row = dict[str, Any]


class Records:
    """A file of JSON lines that only grows; a row is known by its model, probe and question ("id"), and holds the hash
    of the contract and of the model's weights.

    Rows of a model whose weights have changed since are dropped, and counted in `dropped`; so is a last row that a
    crash has cut. Anything else that can't be read is an InputError: nothing of value is thrown away in silence.
    """

    def __init__(self, path: Path, contract: str, weights: dict[str, str]) -> None:
        self.contract, self.weights, self.dropped = contract, weights, 0
        self.rows: dict[Key, Row] = {}
        kept = []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            row = _parsed(path, number, line)
            if row["contract"] != contract:
                raise InputError(f"{path} line {number}: written under another contract; delete the file to begin anew")
            if row["weights"] == weights.get(row["model"], row["weights"]):
                self.rows[_key(row)] = row
                kept.append(line + "\n")
            else:
                self.dropped += 1
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        # A lone surrogate, which JSON may hold and UTF-8 may not, becomes its \\u escape: JSON again.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def missing(self, model: str, probe: str, ids: Iterable[str]) -> list[int]:
        """Places of the ids that have no row yet."""
        return [place for place, name in enumerate(ids) if (model, probe, name) not in self.rows]

    def of(self, model: str, probe: str, ids: Iterable[str]) -> list[Row]:
        """The rows of the ids, in their order. KeyError if one is missing."""
        return [self.rows[model, probe, name] for name in ids]

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, each with "model", "probe" and "id", and hand them to the system."""
        for row in rows:
            row = {**row, "contract": self.contract, "weights": self.weights[row["model"]]}
            self.rows[_key(row)] = row
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _key(row: Row) -> Key:
    return row["model"], row["probe"], row["id"]


def _parsed(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
        if all(isinstance(row[field], str) for field in ("model", "probe", "id", "contract", "weights")):
            return row
        reason = "a field of the wrong type"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InputError(f"{path} line {number}: not a row of an evaluation ({reason}); delete the file to begin anew")
