"""Accuracy per modality with an interval, beside chance and the best guess without the image.

A question counts as right when a lenient reader finds the right letter (`rewards.read_letter`), and
as strictly right when the answer block holds that letter and nothing else (an accuracy reward of
1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data import Question
from rewards import accuracy_reward, format_reward, read_letter

from .statistics import binomial_tail, percent, percent_with_interval, places_by, wilson

LUCK = 0.025  # one side of a 95 % interval
NO_EVIDENCE = "* not above {}: no evidence of seeing"


@dataclass(frozen=True, slots=True)
class Accuracy:
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

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson(self.right, self.total)

    def above(self, blind_rate: float) -> bool:
        """Whether a guess at `blind_rate` would do as well in less than 1 of 40 tests (exact
        binomial).

        If not, nothing shows that the image was seen. At usual numbers that is: the 95 % interval
        lies above the rate. The blind rate counts as known, the best of several though they were
        measured on the same questions; questions count as independent, though some share an image
        or a patient; and nothing is corrected for many tests.
        """
        return binomial_tail(self.right, self.total, blind_rate) < LUCK


def tally(answers: Sequence[str], completions: Sequence[str]) -> Accuracy:
    """Accuracy of completions whose right letters are `answers`; at least one."""
    right = strict = formatted = 0
    for answer, completion in zip(answers, completions, strict=True):
        right += read_letter(completion) == answer
        strict += accuracy_reward(completion, answer) == 1
        formatted += format_reward(completion) == 1
    return Accuracy(len(answers), right, strict, formatted)


def accuracy_by_modality(
    questions: Sequence[Question], completions: Sequence[str]
) -> dict[str, Accuracy]:
    """Tally per modality, in the order in which the modalities first occur."""
    tallies = {}
    for modality, places in places_by(question.modality for question in questions).items():
        answers = [questions[i].answer for i in places]
        tallies[modality] = tally(answers, [completions[i] for i in places])
    return tallies


def run_summary(
    before: dict[str, Accuracy],
    after: dict[str, Accuracy],
    blind: dict[str, dict[str, float]],
    **totals: float,
) -> dict[str, Any]:
    """What summary.json holds: by modality accuracy, format rate, baselines and number of
    questions, and the totals. `blind` is that of `evaluation.audits.blind.by_modality`.
    """
    return {
        "before": {modality: accuracy.rate for modality, accuracy in before.items()},
        "after": {modality: accuracy.rate for modality, accuracy in after.items()},
        "format_before": {modality: accuracy.format_rate for modality, accuracy in before.items()},
        "format_after": {modality: accuracy.format_rate for modality, accuracy in after.items()},
        "chance": blind["chance"],
        "blind": blind,
        "questions": {modality: accuracy.total for modality, accuracy in after.items()},
        **totals,
    }


def comparison_table(
    before: dict[str, Accuracy], after: dict[str, Accuracy], blind: dict[str, dict[str, float]]
) -> str:
    """The table that a run ends with: percent with 95 % intervals, before and after, beside the
    best blind guess.
    """
    table = f"{'':10}{'n':>5}{'chance':>8}{'blind':>7}{'before':>23}{'after':>24}{'format':>16}"
    for modality, new in after.items():
        old = before[modality]
        # The best of several guesses, each measured on these very questions: the harder test.
        best = max(rates[modality] for rates in blind.values())
        chance = percent(blind["chance"][modality])
        table += f"\n{modality:10}{new.total:>5}{chance:>8}{percent(best):>7}"
        table += rate_cell(old, best) + rate_cell(new, best)
        table += f"{100 * old.format_rate:>7.0f} -> {100 * new.format_rate:.0f} %"
    if "*" in table:
        table += "\n" + NO_EVIDENCE.format("what the text alone gives")
    return table


def rate_cell(accuracy: Accuracy, best_blind_rate: float) -> str:
    """ "  93.3 (89.9 to 95.6) ", with a star behind it if that is no evidence of seeing."""
    star = " " if accuracy.above(best_blind_rate) else "*"
    return f"{percent_with_interval(accuracy.right, accuracy.total):>23}{star}"
