"""GRPO on a table of logits, where the exact gradient is known (a minute on one CPU core).

    python -m miniature.lesson

Prints tables of the bias and the noise that each knob of the method gives to the sampled gradient,
then trains the table with each preset, then follows one question through a step of the miniature.
Writes the tables into docs/grpo.md and docs/tour.md, renews the code that docs/grpo.md quotes, and
draws docs/lesson.svg.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import torch
from markupsafe import Markup

from common.program import run_program
from evaluation.report.curves import picture_of
from evaluation.report.markdown import markdown_table, write_between_markers

from . import measurements
from .presets import gradients_of_presets, presets
from .quotes import with_quotes
from .tour import write_tour

LESSONS = {
    "questions": measurements.questions,
    "baseline by group size": measurements.baselines,
    "scale by group size": measurements.scales,
    "length of each question's gradient by scale": measurements.question_weights,
    "average by group size": measurements.averages,
    "dynamic sampling": measurements.dynamic_sampling,
    "KL estimators": measurements.kl_estimators,
    "ratio and clip after an update": measurements.inner_updates,
    "gradient of each preset": gradients_of_presets,
    "presets": presets,
}
LEGEND = """
cosine and length are those of the mean gradient over many sampled steps, with standard errors; the
exact gradient of the expected reward has 1 and 1. noise is the standard deviation of one step's
gradient, in units of the exact gradient's length. Unless a table says otherwise: G = 8,
leave_one_out, no scale, constant average, one update per rollout, no KL term.
"""


def run_lesson() -> None:
    parser = argparse.ArgumentParser(description="Measure what each knob of GRPO does.")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of grpo.md")
    parser.add_argument("--replicates", type=int, default=20_000, help="sampled steps per row")
    parser.add_argument("--runs", type=int, default=64, help="training runs per preset")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads sum in another order, and round differently
    page = arguments.docs / "grpo.md"
    pictures: list[Markup] = []
    print(LEGEND)
    for name, lesson in LESSONS.items():
        rows, panels = lesson(arguments.runs if lesson is presets else arguments.replicates)
        head, cells = list(rows[0]), [list(row.values()) for row in rows]
        print(terminal_text(name, [head, *cells], lesson.__doc__ or ""), flush=True)
        write_between_markers(page, name, markdown_table(head, cells))
        pictures += panels
    (arguments.docs / "lesson.svg").write_text(picture_of(pictures), encoding="utf-8")
    write_tour(arguments.docs)
    page.write_text(with_quotes(page.read_text(encoding="utf-8")), encoding="utf-8")


def terminal_text(name: str, table: Sequence[Sequence[str]], see: str) -> str:
    """The table in aligned columns under its name, and what to see in it."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [name.upper()]
    for row in table:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join((*lines, fill(" ".join(see.split()), 100), ""))


if __name__ == "__main__":
    sys.exit(run_program("lesson", run_lesson))
