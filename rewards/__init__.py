"""The rewards: rules that score a completion, and say why. Pure Python; imports nothing of the other packages."""

from rewards.consistency import consistency_reward
from rewards.letter import LETTERS, Parsed, parse_letter
from rewards.rules import Verdict, accuracy_reward, answer_text, format_reward, read_letter, think_text
from rewards.scoring import RULES, score

__all__ = [
    "LETTERS",
    "RULES",
    "Parsed",
    "Verdict",
    "accuracy_reward",
    "answer_text",
    "consistency_reward",
    "format_reward",
    "parse_letter",
    "read_letter",
    "score",
    "think_text",
]
