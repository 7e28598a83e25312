"""Completions that are on disk, with the questions they answer: JSON lines, of an evaluation or
from elsewhere.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_bytes
from data import canonical_modality, option_letter
from data.rows import Row
from rewards import LETTERS


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote to a multiple-choice question.

    Attributes:
        id: the question's own name; two completions with the same id answer the same question.
        model: who wrote it.
        modality: canonical name ("MRI", "CT", ...), or "unknown".
        question_type: the file's own word for it, or "".
        options: 2 to 10 texts; the first is A.
        answer: the right option's letter.
        completion: the text, tags and all.
    """

    id: str
    model: str
    modality: str
    question_type: str
    question: str
    options: tuple[str, ...]
    answer: str
    completion: str


def read_completions(file: Path | str) -> tuple[list[Completion], int]:
    """The usable completions of a file, and the number of those skipped because there is nothing to
    judge them by.

    Each line is an object with `id`, `model`, `question`, `options` (list of texts), `ground_truth`
    (letter), `completion`, and optionally `modality` and `question_type`. A line whose `options`
    are null, or whose `ground_truth` is not a letter, is skipped.

    Raises:
        InputError: one line that names the file, the line, the field and the remedy.
    """
    file = Path(file)
    read = [_completion(row) for row in _rows(file)]
    if not read:
        raise InputError(f"{file}: holds no completions: give one JSON object a line")
    usable = [completion for completion in read if completion is not None]
    return usable, len(read) - len(usable)


def _rows(file: Path) -> Iterator[Row]:
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{file}: can't read the completions ({error.strerror}): correct the path"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 text (byte {error.start}): save the completions as UTF-8"
        ) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(
                _parsed(line, f"{file} line {number}"),
                file,
                f"line {number}",
                file.parent,
                check_images=False,
            )


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}): give one JSON object a line") from None


def _completion(row: Row) -> Completion | None:
    for field in ("options", "ground_truth", "completion"):
        if field not in row.fields:
            row.fail(
                field, "is missing", "add it (null options or ground truth: the line is skipped)"
            )
    answer = row.fields["ground_truth"]
    answer = answer.strip().upper() if isinstance(answer, str) else ""
    if row.fields["options"] is None or not (len(answer) == 1 and "A" <= answer <= "Z"):
        return None
    options = row.strings("options")
    if not 2 <= len(options) <= len(LETTERS):
        row.fail("options", f"holds {len(options)}", f"give 2 to {len(LETTERS)}")
    if answer > (last := option_letter(len(options) - 1)):
        row.fail(
            "ground_truth", f"is {answer}, but the options end at {last}", "name an option's letter"
        )
    if not isinstance(row.fields["completion"], str):
        row.fail("completion", "is not a text", "give the model's text, which may be empty")
    return Completion(
        id=row.string("id"),
        model=row.string("model"),
        modality=canonical_modality(row.optional_string("modality")),
        question_type=row.optional_string("question_type"),
        question=row.string("question"),
        options=options,
        answer=answer,
        completion=row.fields["completion"],
    )
