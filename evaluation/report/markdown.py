"""Write an evaluation's tables into Markdown pages, between markers.

    python -m evaluation.report.markdown runs/miniature/eval README.md docs/audits.md

Each table goes wherever a page has its markers:

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
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_tables(page: Path, texts: dict[str, str]) -> list[str]:
    """Replace the text between the page's markers with `texts` (marker name -> text). Returns the
    names of the markers that the page has.
    """
    whole, written = page.read_text(encoding="utf-8"), []
    for name, text in texts.items():
        before, begin, rest = whole.partition(f"<!-- {name}: written by a command -->\n")
        _, end, after = rest.partition(f"<!-- {name}: end -->\n")
        if end:
            whole = f"{before}{begin}{text}\n{end}{after}"
            written.append(name)
    page.write_text(whole, encoding="utf-8")
    return written


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


def type_table(results: Row) -> str:
    """Accuracy by modality and question type, with the stars of `accuracy_table`."""
    rows = [row for row in results["accuracy"] if row["question_type"] is not None]
    kinds = list(dict.fromkeys(row["question_type"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        star = "" if row["sees"] else " \\*"
        line = cells.setdefault((row["modality"], row["model"]), {})
        line[row["question_type"]] = percent(row["rate"]) + star
    lines = []
    for modality in dict.fromkeys(row["modality"] for row in rows):
        for (of, model), line in cells.items():
            if of == modality:
                lines.append((modality, model, *(line.get(kind, "") for kind in kinds)))
    return markdown_table(("", "", *kinds), lines)


def check_table(results: Row) -> str:
    """For each check of reasoning and answers, the rate in percent and the number counted."""
    models = [model["name"] for model in results["models"]]
    cells: dict[str, dict[str, str]] = {}
    for row in results["faithfulness"]:
        cells.setdefault(row["check"], {})[row["model"]] = f"{percent(row['rate'])} of {row['of']}"
    lines = [(check, *(line.get(model, "") for model in models)) for check, line in cells.items()]
    return markdown_table(("", *models), lines)


TABLES = {"accuracy": accuracy_table, "types": type_table, "checks": check_table}
"""Marker name -> function that makes the table from the content of results.json."""


def main() -> int:
    return run_program("markdown", _write)


def _write() -> None:
    parser = argparse.ArgumentParser(description="Write an evaluation's tables into pages.")
    parser.add_argument("evaluation", type=Path, help="folder of an evaluation, with results.json")
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown pages with markers")
    arguments = parser.parse_args()
    results = read_json(arguments.evaluation / "results.json", "run evaluate.py first")
    texts = {name: table(results) for name, table in TABLES.items()}
    for page in arguments.pages:
        written = write_tables(page, texts)
        if not written:
            raise InputError(
                f"{page}: has no markers for {', '.join(texts)}; add two lines, such as "
                "<!-- accuracy: written by a command --> and <!-- accuracy: end -->"
            )
        print(f"{page}: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
