"""GRPO on a table of logits, where the exact gradient is known (a minute on one CPU core).

    python -m miniature.lesson

Prints tables of the bias and the noise that each knob of the method gives to the sampled gradient,
then trains the table with each preset, then follows one question through a step of the miniature.
Writes the tables into docs/grpo.md and docs/tour.md, renews the code that docs/grpo.md quotes, and
draws docs/lesson.svg.
"""

import argparse
import sys
from pathlib import Path

import torch

from common.program import run_program

from . import measurements
from .page import terminal_text, write_page
from .presets import presets
from .quotes import write_quotes
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
    print(LEGEND)
    done = {}
    for name, lesson in LESSONS.items():
        count = arguments.runs if lesson is presets else arguments.replicates
        done[name] = lesson(count)
        print(terminal_text(name, done[name], lesson.__doc__ or ""), flush=True)
    write_page(done, arguments.docs)
    write_tour(arguments.docs)
    write_quotes(arguments.docs / "grpo.md")


if __name__ == "__main__":
    sys.exit(run_program("lesson", run_lesson))
