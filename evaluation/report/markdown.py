"""Tables in Markdown pages, written between markers by commands and not by hand.

    python -m evaluation.report.markdown runs/miniature/eval README.md

writes an evaluation's accuracy table to where the page has these two lines:

    <!-- accuracy: written by a command -->
    <!-- accuracy: end -->
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import InputError
from common.files import read_json
from common.program import run_program

from ..records import Row
from ..statistics import percent, percent_with_interval

NAMES = {
    "base": "base model",
    "sft": "SFT on the right letters",
    "blind": "GRPO trained without the images",
    "grpo": "**GRPO**",
}
"""Display names of the default models; others keep their own names."""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write_between_markers(page: Path, name: str, text: str) -> None:
    """Replace what stands between the page's markers of this name. InputError if it has none."""
    before, after = around_markers(page, name)
    page.write_text(before + text + after, encoding="utf-8")


def around_markers(page: Path, name: str) -> tuple[str, str]:
    """The page up to and with the first marker of this name, and from the second one on.

    InputError if it has none.
    """
    begin, end = f"<!-- {name}: written by a command -->\n", f"<!-- {name}: end -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise InputError(f"{page}: has no markers; add the lines {begin}{end}")
    return before + begin, end + after


def accuracy_table(results: Row) -> str:
    """Chance, the best guess from the text alone, and each model's accuracy on each modality.

    `results` is the content of results.json. A star marks an accuracy that is not above the best
    guess without the image, the model's own included.
    """
    rows = [row for row in results["accuracy"] if row["question_type"] is None]
    modalities = list(dict.fromkeys(row["modality"] for row in rows))
    cells: dict[str, list[str]] = {"chance": [], "best guess from the text alone": []}
    for modality in modalities:
        rates = {name: rate_of[modality] for name, rate_of in results["blind"].items()}
        cells["chance"].append(percent(rates["chance"]))
        cells["best guess from the text alone"].append(percent(max(rates.values())))
    for row in rows:
        star = "" if row["sees"] else " \\*"
        name = NAMES.get(row["model"], row["model"])
        cells.setdefault(name, []).append(percent_with_interval(row["right"], row["n"]) + star)
    counts = [f"{row['modality']}, n = {row['n']}" for row in rows[: len(modalities)]]
    return markdown_table(["", *counts], [(name, *line) for name, line in cells.items()])


def main() -> int:
    return run_program("markdown", _write)


def _write() -> None:
    parser = argparse.ArgumentParser(description="Write an evaluation's table into a page.")
    parser.add_argument("evaluation", type=Path, help="folder of an evaluation, with results.json")
    parser.add_argument("page", type=Path, help="Markdown page with the markers")
    arguments = parser.parse_args()
    results = read_json(arguments.evaluation / "results.json", "run evaluate.py first")
    write_between_markers(arguments.page, "accuracy", accuracy_table(results))


if __name__ == "__main__":
    sys.exit(main())
