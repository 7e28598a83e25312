"""Compare two models from two evaluations, question by question.

    python -m evaluation.compare runs/a/eval runs/b/eval --models grpo grpo

Both models answered the same questions, so the test is McNemar's. Evaluations with different
contracts (questions, prompt, pixels, length limit or rules) are refused; the error names the
difference.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError
from common.program import run_program

from .contract import read_contract, refuse_unlike
from .records import Rows, read_rows
from .results import pair_rows, rights
from .statistics import percent_with_interval

LINE = "{:10}{:>5}{:>23}{:>23}{:>9}{:>9}   {}"


def compare(folders: Sequence[Path], models: Sequence[str]) -> str:
    """The comparison as a table: for each modality both accuracies (percent, 95 % interval), the
    number of questions that only one model answered right, and p. `folders` and `models` are pairs.
    """
    ours, theirs = map(read_contract, folders)
    refuse_unlike(ours, theirs, f"{folders[1]} (there) and {folders[0]} (here)")
    # The same contract means the same questions in the same order, whatever the files are called.
    totals = [ours.get("number of questions")] * 2
    first, second = map(_answers, folders, models, totals)
    lines = [f"1: {models[0]} ({folders[0]})", f"2: {models[1]} ({folders[1]})", ""]
    lines.append(LINE.format("", "n", "1", "2", "only 1", "only 2", "p"))
    # pair_rows puts the later of two models first.
    for pair in pair_rows({"2": second, "1": first}):
        modality = pair["modality"]
        cells = []
        for rows in (first, second):
            right = rights([row for row in rows if row["modality"] == modality])
            cells.append(percent_with_interval(sum(right), len(right)))
        cells += [pair["only_first"], pair["only_second"], f"{pair['p']:.2g}"]
        lines.append(LINE.format(modality, len(right), *cells))
    return "\n".join(lines)


def _answers(folder: Path, model: str, total: int | None) -> Rows:
    """A model's rows, in the order of the questions. InputError if any is missing."""
    rows = read_rows(folder / "predictions.jsonl")
    answers = [row for row in rows if row["model"] == model]
    if len(answers) != total:
        known = ", ".join(dict.fromkeys(row["model"] for row in rows))
        raise InputError(
            f"{folder}: {model!r} has answered {len(answers)} of {total} questions; "
            f"run evaluate.py, or name another model ({known})"
        )
    return sorted(answers, key=lambda row: row["place"])


def main() -> int:
    parser = argparse.ArgumentParser("compare", description=__doc__.split("\n")[0])
    parser.add_argument(
        "folders", nargs=2, type=Path, metavar="FOLDER", help="folder of an evaluation"
    )
    parser.add_argument(
        "--models",
        nargs=2,
        default=("grpo", "grpo"),
        metavar="NAME",
        help="the model of the first and of the second evaluation (default: grpo)",
    )
    given = parser.parse_args()
    return run_program("compare", lambda: print(compare(given.folders, given.models)))


if __name__ == "__main__":
    sys.exit(main())
