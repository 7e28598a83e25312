"""SFT against GRPO, with and without sight, on three bases (two to three hours on 2 cores).

    python -m miniature.study

First trials on validation questions choose each arm's learning rate and length; then every arm is
trained with fresh seeds, and answers the test questions once. Stopped, it goes on from there; at
the end it writes the tables of docs/study.md and the curves of docs/study.svg.
"""

import argparse
import sys
from pathlib import Path

from common.program import run_program

from .arms import ARMS, BASES
from .page import write_page
from .runs import Study, do


def run_study() -> None:
    parser = argparse.ArgumentParser(description="Run the study, or what is left of it.")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of all runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where study.md stands")
    arguments = parser.parse_args()
    study = Study(arguments.out)
    from_bases = [arm for arm in ARMS if not arm.begins_with]
    from_arms = [arm for arm in ARMS if arm.begins_with]
    for arms in (from_bases, from_arms):  # the latter go on from what the former have learned
        do("trials", study.trials(arms))
    do("bases", study.bases())
    for base in BASES:
        for arms in (from_bases, from_arms):
            do(f"runs on the {base.name} base", study.runs(base, arms))
    do("answers", study.answers())
    write_page(study, arguments.docs)


if __name__ == "__main__":
    sys.exit(run_program("study", run_study, "stopped; run the same command again to resume"))
