"""The rewards: rules that score a completion, and say why. Pure Python; imports nothing of the other packages."""

from rewards.letter import LETTERS, Parsed, parse_letter
from rewards.rules import RULES, Verdict, accuracy_reward, answer_text, format_reward, score

__all__ = ["LETTERS", "RULES", "Parsed", "Verdict", "accuracy_reward", "answer_text", "format_reward", "parse_letter",
           "score"]
