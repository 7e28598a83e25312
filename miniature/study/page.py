"""The study's page: tables between the markers of docs/study.md, curves beside it."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from evaluation.report.curves import HEIGHT, panel_svg, picture_of, read_metrics
from evaluation.report.markdown import write_between_markers

from . import tables
from .arms import BASES, BY_FOLDER, SHIPPED, Arm
from .runs import Study

CURVES = {"sft-bare": "orange", "sft-named": "violet", "grpo": "blue", "grpo-noise": "grey"}
"""The arms whose curves are drawn, each with its colour."""
LABELS = HEIGHT - 20 - 12 * len(CURVES)  # in the corner below, where no curve ends


def write_page(study: Study, folder: Path) -> None:
    """Fill the markers of `folder`/study.md and draw `folder`/study.svg."""
    answers = tables.Answers(study)
    texts = {
        "settings": tables.settings(study),
        "trials": tables.trials(study),
        "accuracy": tables.accuracies(answers, SHIPPED),
        "paired": tables.paired(answers, SHIPPED),
        "modality": tables.modality_apart(answers, SHIPPED),
        "types": tables.by_type(answers),
        "sight": tables.sight(answers, SHIPPED),
        "shortcuts": tables.shortcuts(answers, SHIPPED),
    }
    for base in BASES[1:]:
        texts[f"{base.name} base"] = "\n".join(
            (
                tables.accuracies(answers, base),
                tables.paired(answers, base),
                tables.modality_apart(answers, base),
                tables.shortcuts(answers, base),
            )
        )
    for name, text in texts.items():
        write_between_markers(folder / "study.md", name, text)
    (folder / "study.svg").write_text(curves(study), encoding="utf-8")


def curves(study: Study) -> str:
    """Accuracy on the validation questions against steps, completion tokens and seconds."""
    series: dict[str, list[tuple[str, str, Sequence[tuple[float, float]]]]] = {}
    for folder, colour in CURVES.items():
        arm = BY_FOLDER[folder]
        for unit, points in validation_curves(study, arm).items():
            series.setdefault(unit, []).append((arm.name, colour, points))
    title = "Right of the MRI validation questions"
    panels = [
        panel_svg(title, lines, unit, top=1.0, labels=LABELS) for unit, lines in series.items()
    ]
    return picture_of(panels)


def validation_curves(study: Study, arm: Arm) -> dict[str, list[tuple[float, float]]]:
    """By what x counts: the points of an arm on the shipped base, means over its seeds."""
    runs = []
    for seed in SHIPPED.seeds:
        folder = study.run_dir(SHIPPED, arm, seed)
        metrics = read_metrics(folder / "metrics.jsonl")
        tokens = list(accumulate(row["tokens"] for row in metrics))
        seconds = list(accumulate(row["seconds"] for row in metrics))
        rows = []
        for steps, (right, total) in study.validated(folder).items():
            rows.append((steps, tokens[steps - 1], seconds[steps - 1], right / total))
        runs.append(rows)
    curves: dict[str, list[tuple[float, float]]] = {"steps": [], "tokens": [], "seconds": []}
    for of_seeds in zip(*runs, strict=True):  # the seeds at one step
        *xs, y = (fmean(values) for values in zip(*of_seeds, strict=True))
        for points, x in zip(curves.values(), xs, strict=True):
            points.append((x, y))
    return curves
