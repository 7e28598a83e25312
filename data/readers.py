"""Question files, told apart by what is in them.

1. MedVLM-R1 and HuatuoGPT-Vision: `image` (list of paths), `question`, `options` (list), `answer`
   (an option's text); optionally `solution` (letter), `modality` or `subset`, `question_type`.
2. OmniMedVQA's own QA files: `image_path`, `question`, `gt_answer` (an option's text), `option_A`,
   `option_B`, ...; optionally `modality_type`, `question_type`.
3. Med-R1's splits: `image` (one path), `problem` ("Q? A)x, B)y, C)z"), `solution` ("<answer> C
   </answer>"); optionally `modality`, `question_type`. The published splits name no modality in the
   row: their files are called after it ("X-Ray_test.json"), and where the name says nothing known,
   the modality is "unknown".

Each is a JSON list of objects, or JSON lines. A row has at most `LONGEST_ROW` characters, and rows
are parsed one at a time, so that a hostile file does not fill the memory. Every error is one
InputError that names the file, the row (counted from 1; in JSON lines the line), the field and the
remedy.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_bytes

from .question import MODALITIES, UNKNOWN_MODALITY, Question, canonical_modality, option_letter
from .rows import Row

LETTERS = tuple(option_letter(index) for index in range(10))  # as many as the rewards know
LONGEST_ROW = 1_000_000  # characters
_REMEDY = "give a JSON list of questions, or JSON lines"
_USUAL_ROW = 10_000  # characters that are looked at first
_BREAK = (
    r"[,\n]\s{0,40}"  # before an option; unbounded, a run of line ends would take quadratic time
)
_BLANK = re.compile(r"\s*")
_LINE = re.compile(
    r"^[^\S\n]*+(\S[^\n]*)", re.MULTILINE
)  # of more than white space; never tried twice at one place


def read_questions(
    file: Path | str, image_dir: Path | str | None = None, check_images: bool = True
) -> list[Question]:
    """All questions of a file, in any of the three layouts above.

    Args:
        file: a JSON list or JSON lines.
        image_dir: the folder that image paths are relative to; None: the file's own. No path may
            leave it, by being absolute, by `..` or through a symbolic link.
        check_images: whether every image must exist.

    Raises:
        InputError: see the module's docstring.
    """
    file = Path(file)
    objects = _objects(file)
    image_root = Path(os.path.realpath(file.parent if image_dir is None else image_dir))
    return [
        _question(Row(fields, file, place, image_root, check_images)) for place, fields in objects
    ]


def _objects(file: Path) -> Iterator[tuple[str, Any]]:
    """("row 1", object), ... of a list, or ("line 1", object), ... of JSON lines, each parsed when
    its turn comes.
    """
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{file}: can't read the question file ({error.strerror}): correct the path"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 text (byte {error.start}): save the question file as UTF-8"
        ) from None
    start = _blank_end(text, 0)
    if start == len(text):
        raise InputError(f"{file}: the question file is empty: {_REMEDY}")
    return _rows(text, start + 1, file) if text[start] == "[" else _lines(text, file)


def _rows(text: str, at: int, file: Path) -> Iterator[tuple[str, Any]]:
    """The values of the list whose bracket opens before `at`."""
    at = _blank_end(text, at)
    if text[at : at + 1] == "]":
        raise InputError(f"{file}: the list of questions is empty: give at least one")
    for number in count(1):
        row, at = _value(text, at, len(text), f"{file} row {number}")
        yield f"row {number}", row
        at = _blank_end(text, at)
        separator, at = text[at : at + 1], _blank_end(text, at + 1)
        if separator != ",":
            break
    if separator != "]" or at < len(text):
        raise InputError(
            f"{file}: not JSON (row {number} is not followed by a comma, or by ] and nothing): {_REMEDY}"
        )


def _lines(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    number, counted = 1, 0
    for match in _LINE.finditer(text):
        number, counted = number + text.count("\n", counted, match.start()), match.start()
        row, at = _value(text, match.start(1), match.end(), f"{file} line {number}")
        if _blank_end(text, at) < match.end():
            raise InputError(
                f"{file} line {number}: not JSON (something follows the object): {_REMEDY}"
            )
        yield f"line {number}", row


def _value(text: str, start: int, end: int, where: str) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends: `end` at the latest, within
    `LONGEST_ROW`.
    """
    last = min(end, start + LONGEST_ROW)
    for stop in (
        min(last, start + _USUAL_ROW),
        last,
    ):  # a slice is a copy: few rows need the longer one
        try:
            value, length = _DECODER.raw_decode(text[start:stop])
            return value, start + length
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error}, or a row of more than {LONGEST_ROW:,} characters"
                if last < end
                else str(error)
            )
    raise InputError(f"{where}: not JSON ({reason}): {_REMEDY}")


def _blank_end(text: str, at: int) -> int:
    return _BLANK.match(text, at).end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the field {twice!r} stands there twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _question(row: Row) -> Question:
    if row.has("gt_answer") or row.has("option_A"):
        return _omnimedvqa(row)
    if row.has("problem") and not row.has("options") and not row.has("answer"):
        return _med_r1(row)
    return _medvlm_r1(row)


def _medvlm_r1(row: Row) -> Question:
    options = _options(row, "options", row.strings("options"))
    names = (
        (row.string("image"),) if isinstance(row.fields.get("image"), str) else row.strings("image")
    )
    return Question(
        images=tuple(row.image("image", name) for name in names),
        question=row.string("question"),
        options=options,
        answer=_answer_letter(row, "answer", options),
        modality=canonical_modality(
            row.optional_string("modality") or row.optional_string("subset")
        ),
        question_type=row.optional_string("question_type"),
        source=row.source,
    )


def _omnimedvqa(row: Row) -> Question:
    given = [letter for letter in LETTERS if row.has(f"option_{letter}")]
    for letter, expected in zip(given, LETTERS, strict=False):
        if letter != expected:
            row.fail(
                f"option_{expected}",
                f"is missing, but there is an option_{letter}",
                "name the options in order",
            )
    options = _options(row, "option_A", tuple(row.string(f"option_{letter}") for letter in given))
    return Question(
        images=(row.image("image_path", row.string("image_path")),),
        question=row.string("question"),
        options=options,
        answer=_answer_letter(row, "gt_answer", options),
        modality=canonical_modality(row.optional_string("modality_type")),
        question_type=row.optional_string("question_type"),
        source=row.source,
    )


def _med_r1(row: Row) -> Question:
    question, options = _split_problem(row)
    options = _options(row, "problem", options)
    of_file = canonical_modality(re.sub(r"_(train|test)$", "", row.file.stem))
    of_row = canonical_modality(row.optional_string("modality"))
    return Question(
        images=(row.image("image", row.string("image")),),
        question=question,
        options=options,
        answer=_solution_letter(row, options),
        modality=of_file if of_row == UNKNOWN_MODALITY and of_file in MODALITIES else of_row,
        question_type=row.optional_string("question_type"),
        source=row.source,
    )


def _split_problem(row: Row) -> tuple[str, tuple[str, ...]]:
    """Question and options of "Q? A)x, y, B)z".

    An option begins after a comma or at the start of a line, and only with the next letter in turn,
    so that options may hold commas and parentheses. The first is the last `A)` before the first
    such `B)`.
    """
    problem = row.string("problem")
    second = re.search(rf"{_BREAK}B\)", problem)
    firsts = list(re.finditer(r"(?<![\w(])A\)", problem[: second.start()] if second else ""))
    if not firsts or not problem[: firsts[-1].start()].strip():
        row.fail("problem", "is not of the form 'question A)..., B)...'", "write the options so")
    options = [problem[firsts[-1].end() :]]
    for letter in LETTERS[1:]:
        parts = re.split(rf"{_BREAK}{letter}\)", options[-1], maxsplit=1)
        options[-1:] = [part.strip() for part in parts]
        if len(parts) == 1:
            break
    if "" in options:
        row.fail(
            "problem",
            f"has an empty option {LETTERS[options.index('')]}",
            "fill it or leave it out",
        )
    return problem[: firsts[-1].start()].strip(), tuple(options)


def _options(row: Row, field: str, options: tuple[str, ...]) -> tuple[str, ...]:
    if not 2 <= len(options) <= len(LETTERS):
        row.fail(field, f"makes {len(options)} options in all", f"give 2 to {len(LETTERS)}")
    return options


def _answer_letter(row: Row, field: str, options: tuple[str, ...]) -> str:
    """The letter of the option whose text the field repeats.

    A final full stop may be missing in one of the two, unless another option matches to the letter.
    Where several options have the answer's text, `solution` decides; without it the row is an
    error.
    """
    answer = row.string(field)
    lettered = list(zip(LETTERS, options, strict=False))
    same = [letter for letter, option in lettered if option == answer]
    same = same or [
        letter for letter, option in lettered if option.rstrip(".") == answer.rstrip(".")
    ]
    if not same:
        remedy = "repeat an option's text (a letter goes into `solution`)"
        row.fail(field, f"{answer!r} is none of the options {list(options)}", remedy)
    if row.has("solution"):
        letter = _solution_letter(row, options)
        if letter not in same:
            row.fail(
                "solution", f"is {letter}, but `{field}` is option {same[0]}", "make them agree"
            )
        return letter
    if len(same) > 1:
        row.fail(
            field,
            f"{answer!r} is each of the options {', '.join(same)}",
            "make them differ, or add `solution`",
        )
    return same[0]


def _solution_letter(row: Row, options: tuple[str, ...]) -> str:
    """The letter of "<answer> C </answer>" or of "C"."""
    solution = row.string("solution")
    found = re.fullmatch(r"<answer>\s*([A-Z])\s*</answer>|([A-Z])", solution)
    letter = (found[1] or found[2]) if found else ""
    last = LETTERS[len(options) - 1]
    if not "A" <= letter <= last:
        row.fail(
            "solution", f"{solution!r} is no letter from A to {last}", "name an option's letter"
        )
    return letter
