"""The study's tables in Markdown, from what its runs have left on disk.

Rates are means over an arm's seeds. The seeds answer the same questions, so that an interval is
that of as many questions as one seed was asked: three seeds do not make a test set larger.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from statistics import fmean

from data import read_questions
from evaluation.audits.blind import blind_credits, by_modality
from evaluation.report.markdown import markdown_table
from evaluation.statistics import mcnemar, percent, percent_with_interval

from ..words import LETTERS
from .arms import ARMS, BASES, CONTROLS, GRPO, LENGTHS, RATES, TEST, TRAIN, Base
from .runs import Rows, Study, validated

MODALITIES = ("MRI", "CT", "X-ray")
MODALITY = ("Modality Recognition",)  # in training its answer is always MRI
OTHERS = ("Anatomy Identification", "Disease Diagnosis", "Other Biological Attributes")
ALL = MODALITY + OTHERS
QUESTIONS_PER_STEP = 16
SHOWN = 2  # wrong completions of each shortcut

Answers = dict[str, list[Rows]]
"""Name of an arm, or "the base" -> the answers of each seed."""


def read_answers(study: Study, base: Base) -> Answers:
    answers = {}
    for name, models in study.examined(base).items():
        answers[name] = [model.rows() for model in models]
    return answers


def rights(rows: Rows, modality: str, kinds: Sequence[str] = ALL) -> list[bool]:
    """Whether each answer is right, of the questions of one modality and some types."""
    chosen = [row for row in rows if row["modality"] == modality and row["question_type"] in kinds]
    return [row["letter"] == row["ground_truth"] for row in chosen]


def rates(seeds: Sequence[Rows], kinds: Sequence[str] = ALL) -> list[float]:
    """The share of right answers on each modality, the means over seeds."""
    means = []
    for modality in MODALITIES:
        means.append(fmean(fmean(rights(rows, modality, kinds)) for rows in seeds))
    return means


def skills(study: Study) -> str:
    """How often each base is right where it is made to answer in one way, from the bases' cards."""
    rows = []
    for base in BASES:
        card = (study.base(base) / "README.md").read_text(encoding="utf-8")
        for line in card.splitlines():
            if line.startswith("| made to") and ": right |" in line:
                way, *percents = [cell.strip() for cell in line.strip("|").split("|")]
                rows.append((base.name, way.removesuffix(": right"), *percents))
    before = [f"{modality}, before habits" for modality in MODALITIES]
    return markdown_table(("base", "way", *MODALITIES, *before), rows)


def settings(study: Study) -> str:
    """What the trials chose for each arm."""
    rows = []
    for arm in ARMS:
        chosen = study.choice(arm)
        accuracy = percent(chosen.right / chosen.total)
        questions = f"{chosen.steps * QUESTIONS_PER_STEP:,}"
        rows.append((arm.name, chosen.rate, chosen.steps, questions, accuracy))
    return markdown_table(("arm", "learning rate", "steps", "questions seen", "validation"), rows)


def trials(study: Study) -> str:
    """Every trial: accuracy on the validation questions."""
    rows = []
    for arm in ARMS:
        for learning_rate in RATES:
            row = [arm.name, learning_rate]
            shares = validated(study.trial_dir(arm, learning_rate))
            for steps in LENGTHS:
                right, total = shares[steps]
                row.append(percent(right / total))
            rows.append(row)
    return markdown_table(("arm", "learning rate", *(f"{steps} steps" for steps in LENGTHS)), rows)


def accuracies(answers: Answers) -> str:
    """Each arm on each modality, below what can be had without any image."""
    test = read_questions(TEST)
    guesses = by_modality(test, blind_credits(read_questions(TRAIN), test))
    chance, best = ["chance"], ["best guess from the text"]
    for modality in MODALITIES:
        chance.append(percent(guesses["chance"][modality]))
        best.append(percent(max(rate_of[modality] for rate_of in guesses.values())))
    rows = [chance, best]
    for name, seeds in answers.items():
        cells = [name]
        for modality, rate in zip(MODALITIES, rates(seeds), strict=True):
            n = len(rights(seeds[0], modality))
            cells.append(percent_with_interval(n * rate, n))
        rows.append(cells)
    return markdown_table(("", *MODALITIES), rows)


def paired(answers: Answers, base: Base) -> str:
    """Each seed beside GRPO's: how many questions only GRPO, and only the arm, has right."""
    rows = []
    for arm in ARMS:
        by_seed = zip(base.seeds, answers[arm.name], answers[GRPO.name], strict=True)
        for seed, own, grpo in by_seed:
            rows.append((arm.name, seed, *(_against(own, grpo, name) for name in MODALITIES)))
    return markdown_table(("arm", "seed", *MODALITIES), rows)


def _against(own: Rows, grpo: Rows, modality: str) -> str:
    right, right_of_grpo = rights(own, modality), rights(grpo, modality)
    cell = percent(fmean(right))
    if own is grpo:
        return cell
    pairs = Counter(zip(right, right_of_grpo, strict=True))
    only_grpo, only_own = pairs[False, True], pairs[True, False]
    p = mcnemar(only_grpo, only_own)
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return f"{cell} ({only_grpo}:{only_own}, {p_text})"


def modality_apart(answers: Answers) -> str:
    """Questions about the modality by themselves, and all others."""
    head = [f"{modality}: others" for modality in MODALITIES]
    head += [f"{modality}: modality" for modality in MODALITIES]
    rows = []
    for name, seeds in answers.items():
        shares = rates(seeds, OTHERS) + rates(seeds, MODALITY)
        rows.append((name, *map(percent, shares)))
    return markdown_table(("", *head), rows)


def by_type(answers: Answers) -> str:
    """Each modality's question types."""
    rows = []
    for at, modality in enumerate(MODALITIES):
        for name, seeds in answers.items():
            shares = [rates(seeds, (kind,))[at] for kind in ALL]
            rows.append((modality, name, *map(percent, shares)))
    return markdown_table(("", "", *ALL), rows)


def sight(answers: Answers) -> str:
    """What GRPO gains over the base, in points, with its images and without them in training."""
    rows = []
    before = rates(answers["the base"])
    for arm in (GRPO, *CONTROLS):
        shares = zip(before, rates(answers[arm.name]), strict=True)
        rows.append((arm.name, *(f"{100 * (after - base):+.1f}" for base, after in shares)))
    return markdown_table(("", *MODALITIES), rows)


def shortcuts(answers: Answers) -> str:
    """Asked for the modality of a CT or an X-ray, how often MRI is chosen where it is an option,
    and the completions that do so most often.
    """
    rows = []
    for name, seeds in answers.items():
        offered, texts = 0, Counter[str]()
        for row in chain.from_iterable(seeds):
            options, letter = row["options"], row["letter"]
            asked = row["question_type"] in MODALITY and row["modality"] != "MRI"
            if asked and "MRI" in options:
                offered += 1
                if letter == LETTERS[options.index("MRI")]:
                    # Letters differ from question to question, the sentence does not.
                    texts[re.sub(rf"\b{letter}\b", "…", row["completion"])] += 1
        common = ", ".join(f"`{text}` ({count})" for text, count in texts.most_common(SHOWN))
        rows.append((name, offered, percent(texts.total() / offered), common or "none"))
    return markdown_table(("", "MRI offered", "MRI chosen", "most often by"), rows)
