"""Accuracy per modality with an interval, beside chance and the best guess that never saw the
image.

A question counts as right when a lenient reader finds the right letter (`rewards.read_letter`), and
as strictly right when the answer block holds that letter and nothing else (an accuracy reward of
1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data import Question
from rewards import accuracy_reward, format_reward, read_letter

from .statistics import binomial_tail, wilson


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `total` questions, `strict` of them to the letter, `formatted` in the asked
    form.
    """

    total: int
    right: int
    strict: int
    formatted: int

    @property
    def rate(self) -> float:
        return self.right / self.total

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson(self.right, self.total)

    def above(self, blind_rate: float) -> bool:
        """Whether a guess that is right at `blind_rate` would do as well in less than 1 of 40 tests
        (exact binomial).

        If not, nothing shows that the image was seen. At usual numbers that is: the 95 % interval
        lies above the rate. The blind rate counts as known, the best of several though they were
        measured on the same questions; questions count as independent, though some share an image
        or a patient; and nothing is corrected for many tests.
        """
        return binomial_tail(self.right, self.total, blind_rate) < 0.025


def tally(answers: Sequence[str], completions: Sequence[str]) -> Accuracy:
    """Accuracy of completions whose right letters are `answers`; at least one."""
    pairs = list(zip(answers, completions, strict=True))
    return Accuracy(
        total=len(pairs),
        right=sum(read_letter(completion) == answer for answer, completion in pairs),
        strict=sum(accuracy_reward(completion, answer) == 1 for answer, completion in pairs),
        formatted=sum(format_reward(completion) == 1 for completion in completions),
    )


def accuracy_by_modality(
    questions: Sequence[Question], completions: Sequence[str]
) -> dict[str, Accuracy]:
    """Tally per modality, in the order in which the modalities first occur."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for question, completion in zip(questions, completions, strict=True):
        groups.setdefault(question.modality, []).append((question.answer, completion))
    return {modality: tally(*zip(*pairs)) for modality, pairs in groups.items()}


def run_summary(
    before: dict[str, Accuracy],
    after: dict[str, Accuracy],
    blind: dict[str, dict[str, float]],
    **totals: float,
) -> dict[str, Any]:
    """What summary.json holds: by modality accuracy, format rate, baselines, number of questions;
    and the totals.

    `blind` is `evaluation.audits.blind.by_modality`'s.
    """
    both = {"before": before, "after": after}
    return {
        **{
            name: {modality: a.rate for modality, a in tallies.items()}
            for name, tallies in both.items()
        },
        **{
            f"format_{name}": {modality: a.formatted / a.total for modality, a in t.items()}
            for name, t in both.items()
        },
        "chance": blind["chance"],
        "blind": blind,
        "questions": {modality: a.total for modality, a in after.items()},
        **totals,
    }


NO_EVIDENCE = "* not above {}: no evidence of seeing"


def comparison_table(
    before: dict[str, Accuracy], after: dict[str, Accuracy], blind: dict[str, dict[str, float]]
) -> str:
    """The table that a run ends with: percent with 95 % intervals, before and after, beside the
    best blind guess.
    """
    lines = [
        f"{'':10}{'n':>5}{'chance':>8}{'blind':>7}   {'before':<23}{'after':<23}{'format':>14}"
    ]
    for name, new in after.items():
        best = max(rates[name] for rates in blind.values())
        cells = []
        for a in (before[name], new):
            rate, low, high = (100 * x for x in (a.rate, *a.interval()))
            cells.append(f"{rate:5.1f} ({low:4.1f} to {high:5.1f}){'' if a.above(best) else '*'}")
        formats = f"{100 * before[name].formatted / new.total:.0f} -> {100 * new.formatted / new.total:.0f} %"
        chance = f"{100 * blind['chance'][name]:>8.1f}{100 * best:>7.1f}"
        lines.append(f"{name:10}{new.total:>5}{chance}   {cells[0]:<23}{cells[1]:<23}{formats:>14}")
    mark = NO_EVIDENCE.format("what the text alone gives")
    return "\n".join([*lines, mark] if "*" in "".join(lines) else lines)
