"""Read completions and their questions from JSON lines: those of an evaluation, of a run
(`completions.jsonl`), or of another program.
"""

import re
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.files import read_json_lines
from data import canonical_modality
from data.rows import Row
from rewards import LETTERS


class Completion(NamedTuple):
    """A model's completion of a multiple-choice question; the file has the same field names.

    Attributes:
        id: identifies the question; completions with the same id answer the same question.
        model: the name of the model.
        modality: canonical name ("MRI", "CT", ...), or "unknown".
        question_type: as given in the file, or "".
        options: 2 to 10 texts; the first is A.
        ground_truth: the right option's letter.
        completion: the text, tags included.
    """

    id: str
    model: str
    modality: str
    question_type: str
    question: str
    options: tuple[str, ...]
    ground_truth: str
    completion: str


def read_completions(file: Path | str) -> tuple[list[Completion], int]:
    """The usable completions of a file, and the number of those skipped.

    Each line is an object with `id`, `model`, `question`, `options` (list of texts), `ground_truth`
    (letter), `completion`, and optionally `modality` and `question_type`. A line is skipped if its
    `options` are null or its `ground_truth` is not a letter.

    Raises:
        InputError: a line is malformed, or no completion is usable.
    """
    file = Path(file)
    completions = []
    for number, fields in read_json_lines(file, "give one JSON object per line"):
        # The images may be missing: a file of completions can be audited without them.
        row = Row(fields, file, f"line {number}", file.parent, check_images=False)
        completions.append(_completion(row))
    usable = [completion for completion in completions if completion]
    if not usable:
        remedy = "give one JSON object per line, with options and a letter as `ground_truth`"
        raise InputError(f"{file}: holds no usable completions: {remedy}")
    return usable, len(completions) - len(usable)


def _completion(row: Row) -> Completion | None:
    for field in ("options", "ground_truth", "completion"):
        if field not in row.fields:
            row.fail(field, "is missing", "add it (null options or ground_truth skip the line)")
    # Some files include open questions, whose ground truth is a text or a number.
    answer = str(row.fields["ground_truth"]).strip().upper()
    if row.fields["options"] is None or not re.fullmatch("[A-Z]", answer):
        return None
    options = row.strings("options")
    if not 2 <= len(options) <= len(LETTERS):
        row.fail("options", f"holds {len(options)}", f"give 2 to {len(LETTERS)}")
    last = LETTERS[len(options) - 1]
    if answer > last:
        problem = f"is {answer}, but the options end at {last}"
        row.fail("ground_truth", problem, "give the letter of an option")
    # Not row.string: a completion may be empty, or longer than any field of a question.
    completion = row.fields["completion"]
    if not isinstance(completion, str):
        row.fail("completion", "is not a text", "give the model's text, which may be empty")
    return Completion(
        id=row.string("id"),
        model=row.string("model"),
        modality=canonical_modality(row.optional_string("modality")),
        question_type=row.optional_string("question_type"),
        question=row.string("question"),
        options=options,
        ground_truth=answer,
        completion=completion,
    )
