"""The two rules of MedVLM-R1's reward: is the completion in the requested format, and is its letter
right?

To add a reward, write a function `(completion, answer) -> (score, why)`, add it to `RULES` at the
end, and add a field `<name>_weight` under Rewards in common/config.py.

Source: MedVLM-R1 (arXiv 2502.19634), section on the reward design (a format reward of 1 for
`<think>` then `<answer>` and nothing else; an accuracy reward of 1 for exactly the right letter,
0.5 with extra text, 0 otherwise), and its published `grpo.py`. Departures from that code:

- format: white space around the completion is allowed. An empty think or answer block is not, nor
  are tags inside a block or a second pair of blocks (the original's `.*?` runs across them);
- accuracy: a letter is read as a person would read it (see `rewards.letter`); the original accepts
  any of the characters A-J;
- accuracy: the answer runs from the first `<answer>` to the last `</answer>`, so that a completion
  that answers twice gets at most 0.5, and 0 if it names two letters. The original takes the first
  `<answer>...</answer>`.

As in the original, a missing or truncated answer block scores 0, and accuracy (but not format)
accepts tags in any case. Each rule is deterministic and linear in the completion's length.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from .letter import LETTERS, excerpt, parse_letter, visible

_FORMAT = "<think> </think> <answer> </answer>"
# Tags in any case: format must refuse a second answer in capitals, because accuracy would read it.
_FLAGS = re.IGNORECASE | re.ASCII | re.DOTALL
_TAG = re.compile(r"</?(?:think|answer)>", _FLAGS)
# "(?>...)" never retries from a later opening tag: a thousand unclosed tags would cost a thousand
# scans.
_ANSWER = re.compile(r"(?>.*?<answer>)(.*)</answer>", _FLAGS)
_THINK = re.compile(r"(?>.*?<think>)(.*?)</think>", _FLAGS)
_THINK_BEGIN = re.compile(r"<think>", _FLAGS)
_THINK_END = re.compile(r"</think>", _FLAGS)


@dataclass(frozen=True)
class Verdict:
    """One rule's verdict on a completion: its name, a score in [0, 1], and a printable line that
    says why.
    """

    rule: str
    score: float
    why: str


def format_reward(completion: str) -> float:
    """1 if the completion is one think block, then one answer block, neither blank, and nothing
    else; otherwise 0.
    """
    score, _ = judge_format(completion)
    return score


def accuracy_reward(completion: str, answer: str) -> float:
    """1 if the answer block holds exactly the letter `answer`, 0.5 if it adds something to that
    letter, otherwise 0.

    Raises ValueError if `answer` is not one of the letters A-J (in either case).
    """
    score, _ = judge_accuracy(completion, answer)
    return score


def answer_text(completion: str) -> str | None:
    """The text between the first `<answer>` and the last `</answer>`, or None if there is no such
    block.
    """
    block = _ANSWER.match(completion)
    return block[1] if block else None


def think_text(completion: str) -> str | None:
    """The text between the first `<think>` and the first `</think>` after it, or None if there is
    no such block.
    """
    block = _THINK.match(completion)
    return block[1] if block else None


def read_letter(completion: str) -> str | None:
    """The letter that a completion chooses, read leniently, for evaluation.

    This is the letter that the accuracy rule reads in the answer block. Without such a block, the
    text after `</think>` is read; without a think block either, the whole completion. So a model
    that answers "B" without any tags is not mistaken for one that does not know.
    """
    text = answer_text(completion)
    if text is None:
        *reasoning, text = _THINK_END.split(completion, maxsplit=1)
        if not reasoning and _THINK_BEGIN.search(completion):
            return None  # truncated within its reasoning, where a letter is no answer
    return parse_letter(text)


def judge_format(completion: str, answer: str = "") -> tuple[float, str]:
    """The format rule; see `format_reward`. `answer` is ignored."""
    tags = " ".join(_TAG.findall(completion))
    if tags != _FORMAT:
        return 0.0, f"the tags are {excerpt(tags)}, not {_FORMAT}"
    before, think, between, answer_block, after = _TAG.split(completion)
    outside = (before + between + after).strip()
    if outside:
        return 0.0, f"text outside the blocks: {excerpt(outside)}"
    if not visible(think):
        return 0.0, "the think block is empty"
    if not visible(answer_block):
        return 0.0, "the answer block is empty"
    return 1.0, "one think block, then one answer block, and nothing else"


def judge_accuracy(completion: str, answer: str) -> tuple[float, str]:
    """The accuracy rule; see `accuracy_reward`."""
    right = answer.strip().upper()
    if right not in list(LETTERS):
        raise ValueError(f"the answer must be one letter, A to J, not {excerpt(answer)}")
    text = answer_text(completion)
    if text is None:
        return 0.0, "no <answer>...</answer> block"
    letter = parse_letter(text)
    if letter is None:
        return 0.0, f"the answer {excerpt(text)} chooses no single option letter"
    if letter != right:
        return 0.0, f"the answer chooses {letter}; {right} is right"
    if visible(text).upper() != right:
        return 0.5, f"the answer chooses {right} with something added: {excerpt(text)}"
    return 1.0, f"the answer is exactly {right}"


RULES: dict[str, Callable[[str, str], tuple[float, str]]] = {
    "format": judge_format,
    "accuracy": judge_accuracy,
}
"""Name -> rule(completion, right letter). The weight of rule "x" is the config's `x_weight`."""


def score(completion: str, answer: str) -> tuple[Verdict, ...]:
    """The verdicts of all rules, in the order of `RULES`. ValueError if `answer` is not a letter
    A-J.
    """
    return tuple(Verdict(name, *rule(completion, answer)) for name, rule in RULES.items())
