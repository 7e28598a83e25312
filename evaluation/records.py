"""An evaluation's rows on disk, written one by one so that a killed evaluation can resume."""

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
"""One model's rows, one for each question in order: the fields of predictions.jsonl, and each
probe's row under the probe's name.
"""

FIELDS = {"place": int, "model": str, "probe": str, "id": str, "contract": str, "digest": str}
ANSWER = {"ground_truth": str, "completion": str, "tokens": int, "ended": bool, "rewards": dict}
ANSWER |= {"modality": str, "question_type": str, "question": str, "options": list}
"""The fields of a row of predictions.jsonl besides `FIELDS`, which all rows have."""


class Records:
    """The append-only files of an evaluation: predictions.jsonl for the plain questions,
    probes.jsonl for all other probes.

    A row is identified by its model, its probe and its question's index (`place`). It holds the
    hash of the contract, which fixes the questions, and the digest of the model. Rows of a model
    that has changed since are dropped and counted in `dropped`.

    Args:
        terms: the contract.
        digests: the models' digests, by name.

    Raises:
        InputError: a file holds anything but such rows. A last row torn by a crash is skipped.
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
        """The indices of the questions that have no row yet."""
        places = range(len(self.ids))
        return [place for place in places if (model, probe, place) not in self.rows]

    def of(self, model: str, probes: Sequence[str] = ()) -> Rows:
        """The model's plain rows, each with its rows of `probes`. KeyError if one is missing."""
        rows = []
        for place in range(len(self.ids)):
            of_probes = {probe: self.rows[model, probe, place] for probe in probes}
            rows.append(self.rows[model, PLAIN, place] | of_probes)
        return rows

    def add(self, model: str, probe: str, place: int, fields: Row) -> None:
        """Append a row and hand it to the system at once, so that a kill loses nothing."""
        row = {
            "model": model, "probe": probe, "id": self.ids[place], "place": place, **fields,
            "contract": self.terms["hash"], "digest": self.digests[model],
        }  # fmt: skip
        self.rows[model, probe, place] = row
        # Opened and closed for each row: nothing waits in our buffer.
        with (self.answers if probe == PLAIN else self.probes).open("ab") as file:
            file.write(_line(row))

    def _read(self, path: Path) -> None:
        kept = []
        for row in read_rows(path) if path.exists() else ():
            if row["contract"] != self.terms["hash"]:
                raise InputError(
                    f"{path}: holds rows with another contract; delete it to start over"
                )
            # Models that are not compared this time keep their rows.
            if row["digest"] == self.digests.get(row["model"], row["digest"]):
                self.rows[row["model"], row["probe"], row["place"]] = row
                kept.append(_line(row))
            else:
                self.dropped += 1
        # Rewrite the file without dropped or torn rows; a kill meanwhile leaves the old file.
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)


def question_ids(questions: Sequence[Question]) -> list[str]:
    """The questions' ids in the rows: their sources, numbered where two files share a name."""
    counts: Counter[str] = Counter()
    ids = []
    for question in questions:
        source = question.source
        counts[source] += 1
        ids.append(source if counts[source] == 1 else f"{source} ({counts[source]})")
    return ids


def read_rows(path: Path) -> Rows:
    """Read predictions.jsonl or probes.jsonl. InputError if it holds anything but such rows."""
    remedy = "delete the file to start over, or give another folder"
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
    # JSON may hold a lone surrogate, UTF-8 may not: write it as its \\u escape.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
