"""What an evaluation knows so far, on disk row by row: a killed one goes on where it stopped."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json_lines
from data import Question

from .probes import PLAIN

Row = dict[str, Any]
Rows = list[Row]
"""Of one model, a row for each question in their order: all that predictions.jsonl has, and under
each probe's name the row that the probe gave.
"""

FIELDS = {"place": int, "model": str, "probe": str, "id": str, "contract": str, "digest": str}
ANSWER = {"ground_truth": str, "completion": str, "tokens": int, "ended": bool, "rewards": dict}
ANSWER |= {"modality": str, "question_type": str, "question": str, "options": list}
"""What a row of predictions.jsonl has beside `FIELDS`, which all rows have."""


class Records:
    """The files of an evaluation that only grow: predictions.jsonl, and probes.jsonl for all but
    the plain questions.

    A row is known by its model, its probe and its question's place, and holds the hash of the
    contract (under which a place is a question) and the digest of the model. Rows of a model that
    has changed since are dropped, and counted in `dropped`.

    Args:
        terms: the contract.
        digests: of the models, by name.

    Raises:
        InputError: a file holds anything but such rows; only a last one that a crash has torn is
            passed over.
    """

    def __init__(
        self,
        folder: Path,
        terms: Row,
        digests: dict[str, str],
        questions: Sequence[Question],
    ) -> None:
        self.terms = terms
        self.digests = digests
        self.questions = questions
        self.ids = question_ids(questions)
        self.rows: dict[tuple[str, str, int], Row] = {}
        self.dropped = 0
        self.answers = folder / "predictions.jsonl"
        self.probes = folder / "probes.jsonl"
        self._read(self.answers)
        self._read(self.probes)

    def missing(self, model: str, probe: str) -> list[int]:
        """The places of the questions that have no row yet."""
        places = range(len(self.ids))
        return [place for place in places if (model, probe, place) not in self.rows]

    def of(self, model: str, probes: Sequence[str] = ()) -> Rows:
        """The plain rows with those of the probes. KeyError if one is missing."""
        rows = []
        for place in range(len(self.ids)):
            of_probes = {probe: self.rows[model, probe, place] for probe in probes}
            rows.append(self.rows[model, PLAIN, place] | of_probes)
        return rows

    def add(self, model: str, probe: str, place: int, fields: Row) -> None:
        """Append a row, handed to the system at once: a kill loses none."""
        row = {
            "model": model, "probe": probe, "id": self.ids[place], "place": place, **fields,
            "contract": self.terms["hash"], "digest": self.digests[model],
        }  # fmt: skip
        self.rows[model, probe, place] = row
        # Opened and closed for each row: nothing waits in a buffer when the power goes.
        with (self.answers if probe == PLAIN else self.probes).open("ab") as file:
            file.write(_line(row))

    def _read(self, path: Path) -> None:
        kept = []
        for row in read_rows(path) if path.exists() else ():
            if row["contract"] != self.terms["hash"]:
                raise InputError(
                    f"{path}: holds rows under another contract; delete it to begin anew"
                )
            # A model that is not compared this time keeps its rows.
            if row["digest"] == self.digests.get(row["model"], row["digest"]):
                self.rows[row["model"], row["probe"], row["place"]] = row
                kept.append(_line(row))
            else:
                self.dropped += 1
        # Without what was dropped or torn; a kill meanwhile leaves the old file.
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)


def question_ids(questions: Sequence[Question]) -> list[str]:
    """What rows call the questions: where each was read; with a number behind it if two files have
    one name.
    """
    counts: Counter[str] = Counter()
    ids = []
    for question in questions:
        source = question.source
        counts[source] += 1
        ids.append(source if counts[source] == 1 else f"{source} ({counts[source]})")
    return ids


def read_rows(path: Path) -> Rows:
    """The rows of such a file. InputError if it holds anything else."""
    remedy = "delete the file to begin anew, or name another folder"
    rows = []
    for number, value in read_json_lines(path, remedy):
        row = value if isinstance(value, dict) else {}
        for field, kind in (FIELDS | ANSWER if row.get("probe") == PLAIN else FIELDS).items():
            if not isinstance(row.get(field), kind):
                reason = f"not a row of an evaluation, `{field}` is missing or of the wrong type"
                raise InputError(f"{path} line {number}: {reason}; {remedy}")
        rows.append(row)
    return rows


def _line(row: Row) -> bytes:
    # A lone surrogate, which JSON may hold and UTF-8 may not, becomes its \\u escape: JSON again.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
