"""Two evaluations, model against model: `python -m evaluation.compare runs/a/eval runs/b/eval
--models grpo grpo`.

Each question is answered by both, so the test is McNemar's. Evaluations under different contracts
(other questions, words, pixels, length limit or rules) are refused, with what differs.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from common.errors import InputError

from .contract import refuse_unlike
from .records import read_rows
from .statistics import mcnemar, wilson


def compare(folders: tuple[Path, Path], models: tuple[str, str]) -> list[str]:
    """Lines of a table: for each modality both accuracies (percent, 95 % interval), what only one
    has right, and p.
    """
    terms = [_contract(folder) for folder in folders]
    refuse_unlike(terms[0], terms[1], f"{folders[1]} beside {folders[0]}")
    # Under one contract both asked the same questions in the same order, whatever their files are
    # called.
    first, second = (
        _answers(folder, model, terms[0]) for folder, model in zip(folders, models, strict=True)
    )
    names = [f"{model} ({folder})" for folder, model in zip(folders, models, strict=True)]
    lines = [
        f"1: {names[0]}",
        f"2: {names[1]}",
        "",
        f"{'':10}{'n':>5}   {'1':<22}{'2':<22}only 1   only 2   p",
    ]
    for modality in dict.fromkeys(row["modality"] for row in first):
        places = [place for place, row in enumerate(first) if row["modality"] == modality]
        right = [
            [rows[i]["letter"] == rows[i]["ground_truth"] for i in places]
            for rows in (first, second)
        ]
        cells = []
        for marks in right:
            rate, (low, high) = sum(marks) / len(marks), wilson(sum(marks), len(marks))
            cells.append(f"{100 * rate:5.1f} ({100 * low:4.1f} to {100 * high:5.1f})")
        only_first = sum(a and not b for a, b in zip(*right))
        only_second = sum(b and not a for a, b in zip(*right))
        p = mcnemar(only_first, only_second)
        lines.append(
            f"{modality:10}{len(places):>5}   {cells[0]:<22}{cells[1]:<22}{only_first:>6}{only_second:>9}   {p:.2g}"
        )
    return lines


def _contract(folder: Path) -> dict[str, Any]:
    file = folder / "contract.json"
    try:
        terms = dict(json.loads(file.read_text(encoding="utf-8")))
        if type(terms["number of questions"]) is not int:
            raise TypeError("the number of questions is none")
        return terms
    except OSError as error:
        raise InputError(
            f"{file}: can't be read ({error.strerror}); give the eval/ folder of a run"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: not readable ({type(error).__name__}: {error}); run evaluate.py again"
        ) from None


def _answers(folder: Path, model: str, terms: dict[str, Any]) -> list[dict[str, Any]]:
    """A model's rows, in the order of the questions. InputError if it has not answered them all."""
    file = folder / "predictions.jsonl"
    rows = read_rows(file)
    answers = sorted((row for row in rows if row["model"] == model), key=lambda row: row["place"])
    if not answers:
        known = ", ".join(dict.fromkeys(row["model"] for row in rows))
        raise InputError(f"{folder}: holds no answers of {model!r}; it has {known}")
    if len(answers) != terms["number of questions"]:
        counts = f"{len(answers)} of {terms['number of questions']}"
        raise InputError(
            f"{folder}: {model} has answered only {counts} questions; run evaluate.py again"
        )
    if not all(
        isinstance(row.get("modality"), str) and {"letter", "ground_truth"} <= row.keys()
        for row in answers
    ):
        raise InputError(
            f"{file}: a row of {model!r} has no modality, letter or ground_truth; run evaluate.py again"
        )
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="compare", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "folders", nargs=2, type=Path, metavar="FOLDER", help="eval/ folder of a run"
    )
    parser.add_argument(
        "--models",
        nargs=2,
        default=("grpo", "grpo"),
        metavar="NAME",
        help="whose answers, first and second (default: grpo)",
    )
    given = parser.parse_args()
    try:
        print("\n".join(compare(tuple(given.folders), tuple(given.models))))
    except InputError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGPIPE, signal.SIG_DFL
    )  # who reads a pipe may leave early, as `head` does
    sys.exit(main())
