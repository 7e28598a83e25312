"""Question files, told apart by what is in them.

1. MedVLM-R1 and HuatuoGPT-Vision: `image` (list of paths), `question`, `options` (list), `answer` (an option's text);
   optionally `solution` (letter), `modality` or `subset`, `question_type`.
2. OmniMedVQA's own QA files: `image_path`, `question`, `gt_answer` (an option's text), `option_A`, `option_B`, ...;
   optionally `modality_type`, `question_type`.
3. Med-R1's splits: `image` (one path), `problem` ("Q? A)x, B)y, C)z"), `solution` ("<answer> C </answer>"); optionally
   `modality`, `question_type`. The published splits name no modality in the row: their files are called after it
   ("X-Ray_test.json"), and where the name says nothing known, the modality is "unknown".

Each is a JSON list of objects, or JSON lines. Every error is one InputError that names the file, the row (counted from
1; in JSON lines the line), the field and the remedy.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.errors import InputError

from .question import MODALITIES, UNKNOWN_MODALITY, Question, canonical_modality, option_letter
from .rows import Row

LETTERS = tuple(option_letter(index) for index in range(10))  # as many as the rewards know
_REMEDY = "give a JSON list of questions, or JSON lines"


def read_questions(file: Path | str, image_dir: Path | str | None = None, check_images: bool = True) -> list[Question]:
    """All questions of a file, in any of the three layouts above.

    Args:
        file: a JSON list or JSON lines.
        image_dir: the folder that image paths are relative to; None: the file's own. No path may leave it, by being
            absolute, by `..` or through a symbolic link.
        check_images: whether every image must exist.

    Raises:
        InputError: see the module's docstring.
    """
    file = Path(file)
    image_root = (file.parent if image_dir is None else Path(image_dir)).resolve()
    return [_question(Row(fields, file, place, image_root, check_images)) for place, fields in _objects(file)]


def _objects(file: Path) -> Iterator[tuple[str, Any]]:
    """("row 1", object), ... of a list, or ("line 1", object), ... of JSON lines."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: can't read the question file ({error.strerror}): correct the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}): save the question file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{file}: the question file is empty: {_REMEDY}")
    if text.lstrip().startswith("["):
        rows = _parsed(text, str(file))
        if not rows:
            raise InputError(f"{file}: the list of questions is empty: give at least one")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"{file} line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}): {_REMEDY}") from None


def _question(row: Row) -> Question:
    if row.has("gt_answer") or row.has("option_A"):
        return _omnimedvqa(row)
    if row.has("problem") and not row.has("options") and not row.has("answer"):
        return _med_r1(row)
    return _medvlm_r1(row)


def _medvlm_r1(row: Row) -> Question:
    options = _options(row, "options", row.strings("options"))
    names = (row.string("image"),) if isinstance(row.fields.get("image"), str) else row.strings("image")
    return Question(
        images=tuple(row.image("image", name) for name in names),
        question=row.string("question"),
        options=options,
        answer=_answer_letter(row, "answer", options),
        modality=canonical_modality(row.optional_string("modality") or row.optional_string("subset")),
        question_type=row.optional_string("question_type"),
        source=row.source,
    )


def _omnimedvqa(row: Row) -> Question:
    given = [letter for letter in LETTERS if row.has(f"option_{letter}")]
    for letter, expected in zip(given, LETTERS, strict=False):
        if letter != expected:
            row.fail(f"option_{expected}", f"is missing, but there is an option_{letter}", "name the options in order")
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

    An option begins after a comma or at the start of a line, and only with the next letter in turn, so that options
    may hold commas and parentheses. The first is the last `A)` before the first such `B)`.
    """
    problem = row.string("problem")
    second = re.search(r"[,\n]\s*B\)", problem)
    firsts = list(re.finditer(r"(?<![\w(])A\)", problem[: second.start()] if second else ""))
    if not firsts or not problem[: firsts[-1].start()].strip():
        row.fail("problem", "is not of the form 'question A)..., B)...'", "write the options so")
    options = [problem[firsts[-1].end() :]]
    for letter in LETTERS[1:]:
        parts = re.split(rf"[,\n]\s*{letter}\)", options[-1], maxsplit=1)
        options[-1:] = [part.strip() for part in parts]
        if len(parts) == 1:
            break
    if "" in options:
        row.fail("problem", f"has an empty option {LETTERS[options.index('')]}", "fill it or leave it out")
    return problem[: firsts[-1].start()].strip(), tuple(options)


def _options(row: Row, field: str, options: tuple[str, ...]) -> tuple[str, ...]:
    if not 2 <= len(options) <= len(LETTERS):
        row.fail(field, f"makes {len(options)} options in all", f"give 2 to {len(LETTERS)}")
    return options


def _answer_letter(row: Row, field: str, options: tuple[str, ...]) -> str:
    """The letter of the option whose text the field repeats.

    A final full stop may be missing in one of the two, unless another option matches to the letter. Where several
    options have the answer's text, `solution` decides; without it the row is an error.
    """
    answer = row.string(field)
    lettered = list(zip(LETTERS, options, strict=False))
    same = [letter for letter, option in lettered if option == answer]
    same = same or [letter for letter, option in lettered if option.rstrip(".") == answer.rstrip(".")]
    if not same:
        remedy = "repeat an option's text (a letter goes into `solution`)"
        row.fail(field, f"{answer!r} is none of the options {list(options)}", remedy)
    if row.has("solution"):
        letter = _solution_letter(row, options)
        if letter not in same:
            row.fail("solution", f"is {letter}, but `{field}` is option {same[0]}", "make them agree")
        return letter
    if len(same) > 1:
        row.fail(field, f"{answer!r} is each of the options {', '.join(same)}", "make them differ, or add `solution`")
    return same[0]


def _solution_letter(row: Row, options: tuple[str, ...]) -> str:
    """The letter of "<answer> C </answer>" or of "C"."""
    solution = row.string("solution")
    found = re.fullmatch(r"<answer>\s*([A-Z])\s*</answer>|([A-Z])", solution)
    letter = (found[1] or found[2]) if found else ""
    last = LETTERS[len(options) - 1]
    if not "A" <= letter <= last:
        row.fail("solution", f"{solution!r} is no letter from A to {last}", "name an option's letter")
    return letter
