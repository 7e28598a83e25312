"""Read question files in three dialects, recognised by their fields.

1. MedVLM-R1 and HuatuoGPT-Vision: `image` (list of paths), `question`, `options` (list), `answer`
   (an option's text); optionally `solution` (letter), `modality` or `subset`, `question_type`.
2. OmniMedVQA's own QA files: `image_path`, `question`, `gt_answer` (an option's text), `option_A`,
   `option_B`, ...; optionally `modality_type`, `question_type`.
3. Med-R1's splits: `image` (one path), `problem` ("Q? A)x, B)y, C)z"), `solution` ("<answer> C
   </answer>"); optionally `modality`, `question_type`. The published rows have no modality: the
   files are named after it ("X-Ray_test.json"). If the name is not a known modality, it is
   "unknown".

Each is a JSON list of objects, or JSON lines. Every error is an InputError that names the file, the
row (counted from 1; in JSON lines the line), the field and the remedy.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_bytes, read_json, read_json_lines
from rewards import LETTERS

from .question import MODALITIES, Question, canonical_modality
from .rows import Row

MOST_LIST_BYTES = 64 * 2**20
"""Limit of a JSON list, about 100,000 questions. A hostile one takes 25 times as much memory."""

_BLANKS = b"\xef\xbb\xbf \t\r\n"  # white space and the byte order mark
_REMEDY = "give a JSON list of questions, or JSON lines, as UTF-8"
# Precedes an option. The white space is bounded because a long run of it would take quadratic time.
_BREAK = r"[,\n]\s{0,40}"


def read_questions(
    file: Path | str, image_dir: Path | str = "", check_images: bool = True
) -> list[Question]:
    """Read all questions of a file in any of the three dialects above.

    Args:
        file: a JSON list or JSON lines.
        image_dir: the folder that image paths are relative to; "" is the folder of the file. No
            path may leave it, whether absolute, by `..` or through a symbolic link.
        check_images: whether every image must exist.

    Raises:
        InputError: see the module docstring.
    """
    file = Path(file)
    kind, values = _values(file)
    image_root = Path(os.path.realpath(image_dir or file.parent))
    questions = []
    for number, fields in values:
        row = Row(fields, file, f"{kind} {number}", image_root, check_images)
        questions.append(_question(row))
    if not questions:
        raise InputError(f"{file}: the question file is empty: {_REMEDY}")
    return questions


def _values(file: Path) -> tuple[str, Iterable[tuple[int, Any]]]:
    """The unit of the numbers ("row" or "line"), and the numbered values of the file."""
    try:
        content = read_bytes(file)
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}): correct the path") from None
    if not content.lstrip(_BLANKS).startswith(b"["):
        # A truncated line is an error here: a missing question must not go unnoticed.
        return "line", read_json_lines(file, _REMEDY, skip_torn=False)
    if len(content) > MOST_LIST_BYTES:
        raise InputError(f"{file}: the JSON list is larger than 64 MB: write it as JSON lines")
    return "row", enumerate(read_json(file, _REMEDY), start=1)


def _question(row: Row) -> Question:
    if row.has("gt_answer") or row.has("option_A"):
        return _omnimedvqa(row)
    # MedVLM-R1's rows may also have a `problem`, besides their options.
    if row.has("problem") and not row.has("options") and not row.has("answer"):
        return _med_r1(row)
    return _medvlm_r1(row)


def _medvlm_r1(row: Row) -> Question:
    options = row.strings("options")
    if not 2 <= len(options) <= len(LETTERS):
        row.fail("options", f"has {len(options)} options", f"give 2 to {len(LETTERS)}")
    answer = _answer_letter(row, "answer", options)
    modality = row.optional_string("modality") or row.optional_string("subset")
    return _made(row, "image", row.string("question"), options, answer, modality)


def _omnimedvqa(row: Row) -> Question:
    given = [letter for letter in LETTERS if row.has(f"option_{letter}")]
    # Use consecutive letters, at least two: if only A and C are given, the error is about B.
    letters = LETTERS[: max(2, len(given))]
    options = tuple(row.string(f"option_{letter}") for letter in letters)
    answer = _answer_letter(row, "gt_answer", options)
    modality = row.optional_string("modality_type")
    return _made(row, "image_path", row.string("question"), options, answer, modality)


def _med_r1(row: Row) -> Question:
    question, options = _split_problem(row)
    answer = _solution_letter(row, options)
    modality = row.optional_string("modality")
    # Other splits are named after a task ("Disease Diagnosis_test.json"), not a modality.
    split_name = re.sub(r"_(train|test)$", "", row.file.stem)
    if not modality and canonical_modality(split_name) in MODALITIES:
        modality = split_name
    return _made(row, "image", question, options, answer, modality)


def _made(
    row: Row, images: str, question: str, options: tuple[str, ...], answer: str, modality: str
) -> Question:
    """The question, with the fields that all dialects share; `images` names the image field."""
    return Question(
        images=row.images(images),
        question=question,
        options=options,
        answer=answer,
        modality=canonical_modality(modality),
        question_type=row.optional_string("question_type"),
        source=row.source,
    )


def _split_problem(row: Row) -> tuple[str, tuple[str, ...]]:
    """The question and the options of "Q? A)x, B)y".

    An option begins after a comma or at the start of a line, and must have the next letter, so that
    options may contain commas and parentheses. The first option begins at the last `A)` before
    option B.
    """
    problem = row.string("problem")
    head, *tail = re.split(rf"{_BREAK}B\)", problem, maxsplit=1)
    match = re.match(r"(.*(?<![\w(]))A\)(.*)", head, re.DOTALL)  # greedy: the last of them
    if not (tail and match and match[1].strip()):
        row.fail("problem", "does not have the form 'question A)..., B)...'", "rewrite it")
    texts = [match[2], *tail]
    for letter in LETTERS[2:]:
        last = re.split(rf"{_BREAK}{letter}\)", texts[-1], maxsplit=1)
        if len(last) == 1:
            break
        texts[-1:] = last
    options = tuple(text.strip() for text in texts)
    if "" in options:
        empty = LETTERS[options.index("")]
        row.fail("problem", f"has an empty option {empty}", "fill it or leave it out")
    return match[1].strip(), options


def _answer_letter(row: Row, field: str, options: tuple[str, ...]) -> str:
    """The letter of the option whose text the field repeats.

    A final full stop may be missing in one of them, unless another option matches exactly. If
    several options have the same text, `solution` decides; without it the row is an error.
    """
    answer, texts = row.string(field), list(options)
    if answer not in texts:
        answer, texts = answer.rstrip("."), [text.rstrip(".") for text in texts]
    same = [letter for letter, text in zip(LETTERS, texts, strict=False) if text == answer]
    if not same:
        remedy = "repeat an option's text (a letter goes into `solution`)"
        row.fail(field, f"{answer!r} matches none of the options {list(options)}", remedy)
    if row.has("solution"):
        letter = _solution_letter(row, options)
        if letter not in same:
            row.fail("solution", f"is {letter}, but `{field}` is {same[0]}", "make them agree")
        return letter
    if len(same) > 1:
        remedy = "make them differ, or add `solution`"
        row.fail(field, f"{answer!r} matches each of the options {', '.join(same)}", remedy)
    return same[0]


def _solution_letter(row: Row, options: tuple[str, ...]) -> str:
    """The letter of "<answer> C </answer>" or of "C"."""
    solution = row.string("solution")
    match = re.fullmatch(r"(<answer>\s*)?([A-Z])(?(1)\s*</answer>)", solution)
    letters = LETTERS[: len(options)]
    if not match or match[2] not in letters:
        row.fail("solution", f"{solution!r} is not a letter from A to {letters[-1]}", "correct it")
    return match[2]
