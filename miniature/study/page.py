"""The study's page: tables between the markers of docs/study.md, curves beside it."""

from itertools import accumulate
from pathlib import Path
from statistics import fmean

from evaluation.report.curves import HEIGHT, Points, panel_svg, picture_of, read_metrics
from evaluation.report.markdown import write_between_markers

from . import tables
from .arms import ARMS, BASES, SHIPPED, Arm
from .runs import Study, validated

CURVES = {"sft-bare": "orange", "sft-named": "violet", "grpo": "blue", "grpo-noise": "grey"}
"""The folders of the arms whose curves are drawn, each with its colour."""
LABELS = HEIGHT - 20 - 12 * len(CURVES)  # in the corner below, where no curve ends


def write_page(study: Study, folder: Path) -> None:
    """Fill the markers of `folder`/study.md and draw `folder`/study.svg."""
    texts = {"settings": tables.settings(study), "trials": tables.trials(study)}
    texts["bases"] = tables.skills(study)
    for base in BASES:
        answers = tables.read_answers(study, base)
        of_base = {
            "accuracy": tables.accuracies(answers),
            "paired": tables.paired(answers, base),
            "modality": tables.modality_apart(answers),
            "shortcuts": tables.shortcuts(answers),
        }
        if base == SHIPPED:
            texts |= of_base
            texts |= {"types": tables.by_type(answers), "sight": tables.sight(answers)}
        else:
            texts[f"{base.name} base"] = "\n".join(of_base.values())
    for name, text in texts.items():
        write_between_markers(folder / "study.md", name, text)
    (folder / "study.svg").write_text(curves(study), encoding="utf-8")


def curves(study: Study) -> str:
    """Accuracy on the validation questions against steps, completion tokens and seconds."""
    arms = [arm for arm in ARMS if arm.folder in CURVES]
    panels = []
    for unit in ("steps", "tokens", "seconds"):
        lines = [(arm.name, CURVES[arm.folder], validation_curve(study, arm, unit)) for arm in arms]
        title = "Right of the MRI validation questions"
        panels.append(panel_svg(title, lines, unit, top=1.0, labels=LABELS))
    return picture_of(panels)


def validation_curve(study: Study, arm: Arm, unit: str) -> Points:
    """The points of an arm on the shipped base, means over its seeds; `unit` is that of x."""
    by_seed = []
    for seed in SHIPPED.seeds:
        folder = study.run_dir(SHIPPED, arm, seed)
        metrics = read_metrics(folder / "metrics.jsonl")
        used = list(accumulate(row.get(unit, 1) for row in metrics))  # a row is one of the "steps"
        points = []
        for steps, (right, total) in validated(folder).items():
            points.append((used[steps - 1], right / total))
        by_seed.append(points)
    means = []
    for at_one_step in zip(*by_seed, strict=True):
        xs, ys = zip(*at_one_step, strict=True)
        means.append((fmean(xs), fmean(ys)))
    return means
