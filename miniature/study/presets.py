"""Every preset on the miniature, from the same base: the table of docs/grpo.md (about a quarter of
an hour on 2 CPU cores).

    python -m miniature.study.presets

Stopped, it goes on from there. Test questions are not touched: accuracy is that on the MRI
validation questions.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from statistics import fmean

from common.command_line import PRESETS
from common.config import read_toml
from common.program import run_program
from evaluation.report.curves import read_metrics
from evaluation.report.markdown import around_markers, markdown_table, write_between_markers
from evaluation.statistics import percent, percent_with_interval

from .arms import GRPO_CONFIG
from .runs import Command, do, training, validated

NAMES = sorted(file.stem for file in PRESETS.glob("*.toml"))
SEEDS = (1, 2, 3)
STEPS = 50
MARKERS = "presets on the miniature"
SHOWN = 5  # steps whose mean reward is shown, the first and the last


def jobs(root: Path) -> list[Command]:
    """The runs that are not finished."""
    commands = []
    for preset, seed in product(NAMES, SEEDS):
        flags = ["--config", GRPO_CONFIG, "--preset", preset, "--seed", str(seed)]
        flags += ["--steps", str(STEPS)]
        commands += training(root / preset / str(seed), flags)
    return commands


def table(root: Path) -> str:
    """What each preset changes, and its rewards, clips and accuracy, means over the seeds."""
    defaults = read_toml(PRESETS / "grpo.toml")
    rows = []
    for preset in NAMES:
        knobs = read_toml(PRESETS / f"{preset}.toml").items()
        turned = [f"`{name}` {value}" for name, value in knobs if value != defaults[name]]
        first, last, clipped, replaced, right = [], [], [], [], 0
        for seed in SEEDS:
            folder = root / preset / str(seed)
            steps = read_metrics(folder / "metrics.jsonl")
            first.append(fmean(step["reward"] for step in steps[:SHOWN]))
            last.append(fmean(step["reward"] for step in steps[-SHOWN:]))
            for step in steps:
                clipped.append(step["clip_ratio/low_mean"] + step["clip_ratio/high_mean"])
                replaced.append(step.get("replaced_groups", 0.0))
            of_run, total = validated(folder)[STEPS]
            right += of_run
        rows.append(
            {
                "preset": f"`{preset}`",
                "changes": ", ".join(turned) or "the defaults",
                "reward": f"{fmean(first):.2f} to {fmean(last):.2f} "
                f"({min(last):.2f} to {max(last):.2f})",
                "clipped": f"{percent(fmean(clipped))} %",
                "replaced": f"{fmean(replaced):.2f}",
                "validation accuracy": percent_with_interval(right / len(SEEDS), total),
            }
        )
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def train_presets() -> None:
    parser = argparse.ArgumentParser(description="Train the miniature with every preset.")
    parser.add_argument("--out", type=Path, default=Path("runs/presets"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where grpo.md stands")
    arguments = parser.parse_args()
    page = arguments.docs / "grpo.md"
    around_markers(page, MARKERS)  # a page without them is an error before the training, not after
    do("presets", jobs(arguments.out))
    write_between_markers(page, MARKERS, table(arguments.out))


if __name__ == "__main__":
    sys.exit(run_program("presets", train_presets, "stopped; run the same command again to resume"))
