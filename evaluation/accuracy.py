"""Greedy accuracy per modality, with an interval and beside chance.

A question counts as right when the accuracy rule gives anything (the right letter, alone or with something appended);
the share of well-formed completions is told apart from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from data import PromptEncoder, Question
from data.vocabulary import Vocabulary
from grpo.sampler import sample_groups
from model import Qwen2VL
from rewards import accuracy_reward, format_reward


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `total` questions, `formatted` of them in the asked form; `chance` is the mean of 1 / options."""

    total: int
    right: int
    formatted: int
    chance: float

    @property
    def rate(self) -> float:
        return self.right / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's 95 % score interval (Wilson 1927) of the rate."""
        n, p = self.total, self.rate
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def answer_greedily(
    model: Qwen2VL, questions: Sequence[Question], encoder: PromptEncoder, vocabulary: Vocabulary, *,
    max_new_tokens: int, batch_prompts: int, label: str,
) -> list[str]:
    """The model's most likely completion of each question, in the order of the questions."""
    prompts = [encoder.encode(question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens_P))  # like lengths together: little padding
    completions = [""] * len(prompts)
    with tqdm(total=len(prompts), desc=label, unit="question", dynamic_ncols=True, leave=False, disable=not prompts) as bar:
        for start in range(0, len(order), batch_prompts):
            batch = order[start : start + batch_prompts]
            rollout = sample_groups(
                model, [prompts[i] for i in batch], group_size=1, max_new_tokens=max_new_tokens,
                end_ids=vocabulary.end_ids, allowed_V=vocabulary.allowed_V, decode=vocabulary.decode,
            )  # fmt: skip
            for i, (text,) in zip(batch, rollout.texts):
                completions[i] = text
            bar.update(len(batch))
    return completions


def accuracy_by_modality(questions: Sequence[Question], completions: Sequence[str]) -> dict[str, Accuracy]:
    """Tally per modality, in the order in which the modalities first occur."""
    rows: dict[str, list[tuple[bool, bool, float]]] = {}
    for question, completion in zip(questions, completions, strict=True):
        right, formatted = accuracy_reward(completion, question.answer) > 0, format_reward(completion) > 0
        rows.setdefault(question.modality, []).append((right, formatted, 1 / len(question.options)))
    return {name: Accuracy(len(r), *(sum(column) for column in list(zip(*r))[:2]), sum(x[2] for x in r) / len(r)) for name, r in rows.items()}


def run_summary(before: dict[str, Accuracy], after: dict[str, Accuracy], **totals: float) -> dict[str, Any]:
    """What summary.json holds: per modality accuracy and format rate before and after, chance, questions; and the totals."""
    both = {"before": before, "after": after}
    return {
        **{name: {modality: a.rate for modality, a in tally.items()} for name, tally in both.items()},
        **{f"format_{name}": {modality: a.formatted / a.total for modality, a in tally.items()} for name, tally in both.items()},
        "chance": {modality: a.chance for modality, a in after.items()},
        "questions": {modality: a.total for modality, a in after.items()},
        **totals,
    }


def comparison_table(before: dict[str, Accuracy], after: dict[str, Accuracy]) -> str:
    """The table that a run ends with: percent with 95 % intervals, before and after."""
    lines = [f"{'':10}{'n':>5}{'chance':>8}   {'before':<22}{'after':<22}{'format':>14}"]
    for name, new in after.items():
        cells = [f"{100 * a.rate:5.1f} ({100 * a.interval()[0]:4.1f} to {100 * a.interval()[1]:5.1f})" for a in (before[name], new)]
        formats = f"{100 * before[name].formatted / new.total:.0f} -> {100 * new.formatted / new.total:.0f} %"
        lines.append(f"{name:10}{new.total:>5}{100 * new.chance:>8.1f}   {cells[0]:<22}{cells[1]:<22}{formats:>14}")
    return "\n".join(lines)
