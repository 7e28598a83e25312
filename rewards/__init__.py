"""Rewards: rules that score a completion and say why. Pure Python; imports none of the other
packages.
"""

from .letter import LETTERS, parse_letter
from .rules import (
    RULES,
    Verdict,
    accuracy_reward,
    answer_text,
    format_reward,
    read_letter,
    score,
    think_text,
)

__all__ = [
    "LETTERS",
    "RULES",
    "Verdict",
    "accuracy_reward",
    "answer_text",
    "format_reward",
    "parse_letter",
    "read_letter",
    "score",
    "think_text",
]
