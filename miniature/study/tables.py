"""The study's tables in Markdown, from what its runs have left on disk.

Rates are means over an arm's seeds. The seeds answer the same questions, so that an interval is
that of as many questions as one seed was asked: three seeds do not make a test set larger.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common.files import read_json_lines
from data import read_questions
from evaluation.audits.blind import blind_credits, by_modality
from evaluation.report.markdown import markdown_table
from evaluation.statistics import mcnemar, percent, percent_with_interval

from ..words import LETTERS
from .arms import (
    ARMS,
    BASES,
    BY_FOLDER,
    CONTROLS,
    LENGTHS,
    RATES,
    SHIPPED,
    TEST,
    TRAIN,
    Arm,
    Base,
)
from .runs import REMEDY, Study

Row = dict[str, Any]
MODALITIES = ("MRI", "CT", "X-ray")
MODALITY = ("Modality Recognition",)  # in training its answer is always MRI
OTHERS = ("Anatomy Identification", "Disease Diagnosis", "Other Biological Attributes")
ALL = MODALITY + OTHERS
QUESTIONS_PER_STEP = 16
GRPO = BY_FOLDER["grpo"]
SHOWN = 2  # wrong completions of each shortcut


class Answers:
    """Every answer of the study to a test question, read once."""

    def __init__(self, study: Study) -> None:
        self._rows: dict[Path, list[Row]] = {}
        self.study = study
        for base in BASES:
            for arm in (None, *ARMS):
                for file in study.answer_files(base, arm):
                    self._rows[file] = [row for _, row in read_json_lines(file, REMEDY)]

    def of(self, base: Base, arm: Arm | None) -> list[list[Row]]:
        """The rows of each seed of an arm; for None those of the base itself."""
        return [self._rows[file] for file in self.study.answer_files(base, arm)]

    def rate(self, base: Base, arm: Arm | None, modality: str, kinds: Sequence[str] = ALL) -> float:
        """The share of right answers, the mean over seeds."""
        return fmean(fmean(rights(rows, modality, kinds)) for rows in self.of(base, arm))


def rights(rows: Iterable[Row], modality: str, kinds: Sequence[str] = ALL) -> list[bool]:
    """Whether each answer is right, of the questions of one modality and some types."""
    chosen = [row for row in rows if row["modality"] == modality and row["question_type"] in kinds]
    return [row["letter"] == row["ground_truth"] for row in chosen]


def name_of(arm: Arm | None) -> str:
    return arm.name if arm else "the base"


def settings(study: Study) -> str:
    """What the trials chose for each arm."""
    rows = []
    for arm in ARMS:
        chosen = study.choice(arm)
        validated = percent(chosen.right / chosen.total)
        seen = f"{chosen.steps * QUESTIONS_PER_STEP:,}"
        rows.append((arm.name, chosen.rate, chosen.steps, seen, validated))
    return markdown_table(("arm", "learning rate", "steps", "questions seen", "validation"), rows)


def trials(study: Study) -> str:
    """Every trial: accuracy on the validation questions."""
    rows = []
    for arm in ARMS:
        for rate in RATES:
            validated = study.validated(study.trial_dir(arm, rate))
            rates = [right / total for right, total in map(validated.__getitem__, LENGTHS)]
            rows.append((arm.name, rate, *map(percent, rates)))
    return markdown_table(("arm", "learning rate", *(f"{steps} steps" for steps in LENGTHS)), rows)


def accuracies(answers: Answers, base: Base) -> str:
    """Each arm on each modality, below what can be had without any image."""
    test = read_questions(TEST)
    guesses = by_modality(test, blind_credits(read_questions(TRAIN), test))
    chance, best = [], []
    for modality in MODALITIES:
        chance.append(percent(guesses["chance"][modality]))
        best.append(percent(max(rate_of[modality] for rate_of in guesses.values())))
    rows: list[Sequence[object]] = [("chance", *chance), ("best guess from the text", *best)]
    for arm in (None, *ARMS):
        cells = []
        for modality in MODALITIES:
            n = len(rights(answers.of(base, arm)[0], modality))
            cells.append(percent_with_interval(n * answers.rate(base, arm, modality), n))
        rows.append((name_of(arm), *cells))
    return markdown_table(("", *MODALITIES), rows)


def paired(answers: Answers, base: Base) -> str:
    """Each seed beside GRPO's: how many questions only GRPO, and only the arm, has right."""
    rows: list[Sequence[object]] = []
    for arm in ARMS:
        by_seed = zip(base.seeds, answers.of(base, arm), answers.of(base, GRPO), strict=True)
        for seed, own, grpo in by_seed:
            rows.append((arm.name, seed, *(_against(own, grpo, name) for name in MODALITIES)))
    return markdown_table(("arm", "seed", *MODALITIES), rows)


def _against(own: list[Row], grpo: list[Row], modality: str) -> str:
    right, right_of_grpo = rights(own, modality), rights(grpo, modality)
    cell = percent(fmean(right))
    if own is grpo:
        return cell
    only_grpo = sum(b > a for a, b in zip(right, right_of_grpo, strict=True))
    only_own = sum(a > b for a, b in zip(right, right_of_grpo, strict=True))
    p = mcnemar(only_grpo, only_own)
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return f"{cell} ({only_grpo}:{only_own}, {p_text})"


def modality_apart(answers: Answers, base: Base) -> str:
    """Questions about the modality by themselves, and all others."""
    head = [""]
    for which in ("others", "modality"):
        head += [f"{name}: {which}" for name in MODALITIES]
    rows = []
    for arm in (None, *ARMS):
        cells = [name_of(arm)]
        for kinds in (OTHERS, MODALITY):
            cells += [percent(answers.rate(base, arm, name, kinds)) for name in MODALITIES]
        rows.append(cells)
    return markdown_table(head, rows)


def by_type(answers: Answers) -> str:
    """Each modality's question types, on the shipped base."""
    rows = []
    for modality in MODALITIES:
        for arm in (None, *ARMS):
            rates = [answers.rate(SHIPPED, arm, modality, (kind,)) for kind in ALL]
            rows.append((modality, name_of(arm), *map(percent, rates)))
    return markdown_table(("", "", *ALL), rows)


def sight(answers: Answers, base: Base) -> str:
    """What GRPO gains over the base, in points, with its images and without them in training."""
    rows = []
    for arm in (GRPO, *CONTROLS):
        cells = [arm.name]
        for modality in MODALITIES:
            gain = answers.rate(base, arm, modality) - answers.rate(base, None, modality)
            cells.append(f"{100 * gain:+.1f}")
        rows.append(cells)
    return markdown_table(("", *MODALITIES), rows)


def shortcuts(answers: Answers, base: Base) -> str:
    """Asked for the modality of a CT or an X-ray, how often MRI is chosen where it is an option,
    and the completions that do so most often.
    """
    rows = []
    for arm in (None, *ARMS):
        offered, texts = 0, Counter[str]()
        for answered in answers.of(base, arm):
            for row in answered:
                if row["question_type"] in MODALITY and row["modality"] != "MRI":
                    options = row["options"]
                    offered += "MRI" in options
                    if "MRI" in options and row["letter"] == LETTERS[options.index("MRI")]:
                        # Letters differ from question to question, the sentence does not.
                        texts[re.sub(rf"\b{row['letter']}\b", "…", row["completion"])] += 1
        common = ", ".join(f"`{text}` ({count})" for text, count in texts.most_common(SHOWN))
        rows.append((name_of(arm), offered, percent(texts.total() / offered), common or "none"))
    return markdown_table(("", "MRI offered", "MRI chosen", "most often by"), rows)
