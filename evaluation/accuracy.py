"""Greedy accuracy per modality, with an interval and beside chance.

A question counts as right when the accuracy rule gives anything (the right letter, alone or with something appended);
the share of well-formed completions is told apart from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from data import PromptEncoder, Question, Vocabulary
from grpo.config import Config
from grpo.sampler import sample_groups
from model import Qwen2VL
from rewards import accuracy_reward, format_reward


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `total` questions, `formatted` of them in the asked form; `expected` right ones by blind guessing."""

    total: int
    right: int
    formatted: int
    expected: float

    @property
    def rate(self) -> float:
        return self.right / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's 95 % score interval (Wilson 1927) of the rate."""
        n, p = self.total, self.rate
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def answer_greedily(
    model: Qwen2VL,
    vocabulary: Vocabulary,
    encoder: PromptEncoder,
    questions: Sequence[Question],
    *,
    config: Config,
    label: str,
) -> list[str]:
    """The model's most likely completion of each question, in the order of the questions."""
    lengths = [encoder.count_tokens(question) for question in questions]
    order = sorted(range(len(questions)), key=lengths.__getitem__)  # like lengths together: little padding
    completions = [""] * len(questions)
    with tqdm(total=len(order), desc=label, unit="question", dynamic_ncols=True, leave=False, disable=not order) as bar:
        for start in range(0, len(order), config.eval_batch_prompts):
            batch = order[start : start + config.eval_batch_prompts]
            prompts = [encoder.encode(questions[i]) for i in batch]
            rollout = sample_groups(model, vocabulary, prompts, None, max_new_tokens=config.max_new_tokens)
            for i, (text,) in zip(batch, rollout.texts, strict=True):
                completions[i] = text
            bar.update(len(batch))
    return completions


def accuracy_by_modality(questions: Sequence[Question], completions: Sequence[str]) -> dict[str, Accuracy]:
    """Tally per modality, in the order in which the modalities first occur."""
    tallies: dict[str, Accuracy] = {}
    for question, completion in zip(questions, completions, strict=True):
        old = tallies.get(question.modality, Accuracy(0, 0, 0, 0.0))
        tallies[question.modality] = Accuracy(
            total=old.total + 1,
            right=old.right + (accuracy_reward(completion, question.answer) > 0),
            formatted=old.formatted + (format_reward(completion) > 0),
            expected=old.expected + 1 / len(question.options),
        )
    return tallies


def run_summary(before: dict[str, Accuracy], after: dict[str, Accuracy], **totals: float) -> dict[str, Any]:
    """What summary.json holds: by modality accuracy, format rate, chance, number of questions; and the totals."""
    both = {"before": before, "after": after}
    return {
        **{name: {modality: a.rate for modality, a in tallies.items()} for name, tallies in both.items()},
        **{
            f"format_{name}": {modality: a.formatted / a.total for modality, a in t.items()} for name, t in both.items()
        },
        "chance": {modality: a.expected / a.total for modality, a in after.items()},
        "questions": {modality: a.total for modality, a in after.items()},
        **totals,
    }


def comparison_table(before: dict[str, Accuracy], after: dict[str, Accuracy]) -> str:
    """The table that a run ends with: percent with 95 % intervals, before and after."""
    lines = [f"{'':10}{'n':>5}{'chance':>8}   {'before':<22}{'after':<22}{'format':>14}"]
    for name, new in after.items():
        old = before[name]
        percents = [[100 * x for x in (a.rate, *a.interval())] for a in (old, new)]
        cells = [f"{rate:5.1f} ({low:4.1f} to {high:5.1f})" for rate, low, high in percents]
        formats = f"{100 * old.formatted / old.total:.0f} -> {100 * new.formatted / new.total:.0f} %"
        chance = 100 * new.expected / new.total
        lines.append(f"{name:10}{new.total:>5}{chance:>8.1f}   {cells[0]:<22}{cells[1]:<22}{formats:>14}")
    return "\n".join(lines)
