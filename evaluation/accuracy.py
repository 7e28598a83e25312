"""Accuracy per modality with an interval, beside chance and the best guess without the image.

A question counts as right when a lenient reader finds the right letter (`rewards.read_letter`), and
as strictly right when the answer block holds that letter and nothing else (an accuracy reward of
1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from data import Question
from rewards import accuracy_reward, format_reward, read_letter

from .audits.blind import Rates
from .statistics import binomial_tail, percent, percent_with_interval, places_by

LUCK = 0.025  # one side of a 95 % interval
NO_EVIDENCE = "* not above {}: no evidence of seeing"
LINE = "{:10}{:>5}{:>8}{:>7}{:>24}{:>24}{:>16}"


class Accuracy(NamedTuple):
    """Of `total` questions (at least 1) how many are right, strictly right, and in the asked
    form.
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
        """Whether a guess at `blind_rate` would do as well in less than 1 of 40 tests (exact
        binomial).

        If not, nothing shows that the image was seen. At usual numbers that is: the 95 % interval
        lies above the rate. The blind rate counts as known, the best of several though they were
        measured on the same questions; questions count as independent, though some share an image
        or a patient; and nothing is corrected for many tests.
        """
        return binomial_tail(self.right, self.total, blind_rate) < LUCK


Accuracies = dict[str, Accuracy]
"""By modality, in the order in which they first occur."""


def tally(answers: Sequence[str], completions: Sequence[str]) -> Accuracy:
    """Accuracy of completions whose right letters are `answers`; at least one."""
    right = strict = formatted = 0
    for answer, completion in zip(answers, completions, strict=True):
        right += read_letter(completion) == answer
        strict += accuracy_reward(completion, answer) == 1
        formatted += format_reward(completion) == 1
    return Accuracy(len(answers), right, strict, formatted)


def accuracy_by_modality(questions: Sequence[Question], completions: Sequence[str]) -> Accuracies:
    """Tally per modality."""
    tallies = {}
    for modality, places in places_by(question.modality for question in questions).items():
        answers = [questions[place].answer for place in places]
        tallies[modality] = tally(answers, [completions[place] for place in places])
    return tallies


def run_summary(
    before: Accuracies, after: Accuracies, blind: Rates, **totals: float
) -> dict[str, Any]:
    """What summary.json holds: by modality accuracy, format rate, baselines and number of
    questions, and the totals. `blind` is that of `evaluation.audits.blind.by_modality`.
    """
    summary: dict[str, Any] = {}
    for when, accuracies in (("before", before), ("after", after)):
        summary[when] = {name: one.rate for name, one in accuracies.items()}
        summary[f"format_{when}"] = {name: one.format_rate for name, one in accuracies.items()}
    questions = {name: accuracy.total for name, accuracy in after.items()}
    return summary | {"chance": blind["chance"], "blind": blind, "questions": questions} | totals


def comparison_table(before: Accuracies, after: Accuracies, blind: Rates) -> str:
    """The table that a run ends with: percent with 95 % intervals, before and after, beside the
    best blind guess.
    """
    # A blank behind the two that may have a star.
    lines = [LINE.format("", "n", "chance", "blind", "before ", "after ", "format")]
    for modality, new in after.items():
        old = before[modality]
        # The best of several guesses, each measured on these very questions: the harder test.
        best = max(rates[modality] for rates in blind.values())
        form = f"{100 * old.format_rate:.0f} -> {100 * new.format_rate:.0f} %"
        guesses = percent(blind["chance"][modality]), percent(best)
        accuracies = rate_cell(old, best), rate_cell(new, best)
        lines.append(LINE.format(modality, new.total, *guesses, *accuracies, form))
    if "*" in "".join(lines):
        lines.append(NO_EVIDENCE.format("what the text alone gives"))
    return "\n".join(lines)


def rate_cell(accuracy: Accuracy, best_blind_rate: float) -> str:
    """ "93.3 (89.9 to 95.6) ", with a star behind it if that is no evidence of seeing."""
    star = " " if accuracy.above(best_blind_rate) else "*"
    return percent_with_interval(accuracy.right, accuracy.total) + star
