"""Accuracy per modality with its 95 % interval, compared with chance and the best blind guess.

A question counts as right if the lenient reader (`rewards.read_letter`) finds the right letter, and
as strictly right if the answer block holds that letter and nothing else (an accuracy reward of 1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from data import Question
from rewards import accuracy_reward, format_reward, read_letter

from .audits.blind import Rates
from .statistics import binomial_tail, percent, percent_with_interval, places_by

SIGNIFICANCE = 0.025  # of a one-sided test; corresponds to a 95 % interval
NO_EVIDENCE = "* not above {}: no evidence of seeing"
LINE = "{:10}{:>5}{:>8}{:>7}{:>24}{:>24}{:>16}"


class Accuracy(NamedTuple):
    """How many of `total` questions (at least 1) are right, strictly right, and in the requested
    format.
    """

    total: int
    right: int
    strict: int
    formatted: int

    @property
    def rate(self) -> float:
        return self.right / self.total

    @property
    def format_rate(self) -> float:
        return self.formatted / self.total

    def above(self, blind_rate: float) -> bool:
        """Whether accuracy is significantly above `blind_rate` (exact binomial test, p < 0.025).

        If not, nothing shows that the model saw the image. With enough questions this means that
        the 95 % interval lies above the blind rate. The test takes the blind rate as known,
        although it is the best of several measured on the same questions. It takes the questions as
        independent, although some share an image or a patient. It does not correct for multiple
        tests.
        """
        return binomial_tail(self.right, self.total, blind_rate) < SIGNIFICANCE


Accuracies = dict[str, Accuracy]
"""Modality -> accuracy, in order of first occurrence."""


def tally(answers: Sequence[str], completions: Sequence[str]) -> Accuracy:
    """The accuracy of completions (at least one) whose right letters are `answers`."""
    right = strict = formatted = 0
    for answer, completion in zip(answers, completions, strict=True):
        right += read_letter(completion) == answer
        strict += accuracy_reward(completion, answer) == 1
        formatted += format_reward(completion) == 1
    return Accuracy(len(answers), right, strict, formatted)


def accuracy_by_modality(questions: Sequence[Question], completions: Sequence[str]) -> Accuracies:
    """The accuracy on each modality."""
    tallies = {}
    for modality, places in places_by(question.modality for question in questions).items():
        answers = [questions[place].answer for place in places]
        tallies[modality] = tally(answers, [completions[place] for place in places])
    return tallies


def run_summary(
    before: Accuracies, after: Accuracies, blind: Rates, **totals: float
) -> dict[str, Any]:
    """The contents of summary.json: accuracy, format rate, baselines and number of questions by
    modality, and the totals. `blind` comes from `evaluation.audits.blind.by_modality`.
    """
    summary: dict[str, Any] = {}
    for when, accuracies in (("before", before), ("after", after)):
        summary[when] = {name: one.rate for name, one in accuracies.items()}
        summary[f"format_{when}"] = {name: one.format_rate for name, one in accuracies.items()}
    questions = {name: accuracy.total for name, accuracy in after.items()}
    return summary | {"chance": blind["chance"], "blind": blind, "questions": questions} | totals


def comparison_table(before: Accuracies, after: Accuracies, blind: Rates) -> str:
    """The table printed at the end of a run: accuracy before and after, in percent with 95 %
    intervals, and the best blind guess.
    """
    # "before " and "after " end in a space, because their cells may end in a star.
    lines = [LINE.format("", "n", "chance", "blind", "before ", "after ", "format")]
    for modality, new in after.items():
        old = before[modality]
        # The best of several baselines, measured on the same questions: the strictest test.
        best = max(rates[modality] for rates in blind.values())
        form = f"{100 * old.format_rate:.0f} -> {100 * new.format_rate:.0f} %"
        guesses = percent(blind["chance"][modality]), percent(best)
        accuracies = rate_cell(old, best), rate_cell(new, best)
        lines.append(LINE.format(modality, new.total, *guesses, *accuracies, form))
    if "*" in "".join(lines):
        lines.append(NO_EVIDENCE.format("the best guess from the text alone"))
    return "\n".join(lines)


def rate_cell(accuracy: Accuracy, best_blind_rate: float) -> str:
    """ "93.3 (89.9 to 95.6) ", or with a star at the end if this is no evidence of seeing."""
    star = " " if accuracy.above(best_blind_rate) else "*"
    return percent_with_interval(accuracy.right, accuracy.total) + star
