"""The two rules of MedVLM-R1's reward: is the completion in the asked format, and is its letter
right?

Source: MedVLM-R1 (arXiv 2502.19634), section on the reward design (a format reward of 1 for
`<think>` then `<answer>` and nothing else; an accuracy reward of 1 for exactly the right letter,
0.5 with extra text, 0 otherwise), and its published `grpo.py`. Departures from that code:

- format: white space around the whole completion is allowed, an empty think or answer block is not,
  and neither are tags inside a block or a second pair of blocks (its `.*?` runs across them);
- accuracy: a letter is what a reader would take for one (see `rewards.letter`), not any of the
  characters A-J. Its code gives 0 to "B, there is no clear ..." and to most correct "B) option
  text" answers, and 0.5 to some that choose no letter;
- accuracy: it takes the first `<answer>...</answer>`. Here the answer runs from the first
  `<answer>` to the last `</answer>`, so that a completion that answers twice gets at most 0.5, and
  nothing if it names two letters.

As there, no answer block, or one that is cut off before its end tag, scores 0, and accuracy (but
not format) takes tags in any case. Each rule is deterministic and linear in the completion's
length.
"""

import re
from dataclasses import dataclass
from itertools import islice

from .letter import LETTERS, excerpt, parse_letter, visible

_ANY_TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE | re.ASCII)
_OPEN = re.compile(r"<answer>", re.IGNORECASE | re.ASCII)
_CLOSE = re.compile(r"</answer>", re.IGNORECASE | re.ASCII)
_THINK = re.compile(r"<think>", re.IGNORECASE | re.ASCII)
_THOUGHT = re.compile(r"</think>", re.IGNORECASE | re.ASCII)
_FORMAT = ["<think>", "</think>", "<answer>", "</answer>"]


@dataclass(frozen=True)
class Verdict:
    """What one rule says of one completion: its name, its score in [0, 1], and one printable line
    that says why.
    """

    rule: str
    score: float
    why: str


def format_reward(completion: str) -> float:
    """1 if the completion is one think block, then one answer block, neither blank, and nothing
    else; otherwise 0.
    """
    return judge_format(completion).score


def accuracy_reward(completion: str, answer: str) -> float:
    """1 if the answer block holds exactly the letter `answer`, 0.5 if that letter with something
    added, otherwise 0.

    Raises ValueError if `answer` is not one of the letters A-J (in either case).
    """
    return judge_accuracy(completion, answer).score


def answer_text(completion: str) -> str | None:
    """What stands between the first `<answer>` and the last `</answer>`, or None if there is no
    such block.
    """
    opened = _OPEN.search(completion)
    closed = None
    for closed in _CLOSE.finditer(completion, opened.end() if opened else len(completion)):
        pass
    return completion[opened.end() : closed.start()] if opened and closed else None


def think_text(completion: str) -> str | None:
    """What stands between the first `<think>` and the first `</think>` after it, or None if there
    is no such block.
    """
    opened = _THINK.search(completion)
    closed = _THOUGHT.search(completion, opened.end()) if opened else None
    return completion[opened.end() : closed.start()] if opened and closed else None


def read_letter(completion: str) -> str | None:
    """The letter that a lenient reader takes a completion to choose, for evaluation.

    It is the one that the accuracy rule finds in the answer block; but where a completion has no
    such block, what follows its `</think>` is read, or, if it has no think block either, all of it.
    So a model that answers "B" without any tag is not taken for one that does not know.
    """
    text = answer_text(completion)
    if text is None:
        thought = _THOUGHT.search(completion)
        if thought is None and _THINK.search(completion):
            return None  # it never came to an end of its reasoning
        text = completion[thought.end() :] if thought else completion
    return parse_letter(text)


def judge_format(completion: str) -> Verdict:
    """The format rule; see `format_reward`."""
    tags = list(islice(_ANY_TAG.finditer(completion), len(_FORMAT) + 1))
    if [tag[0] for tag in tags] != _FORMAT:
        found = " ".join(tag[0] for tag in tags[: len(_FORMAT)]) + (
            " ..." if len(tags) > len(_FORMAT) else ""
        )
        return Verdict("format", 0.0, f"the tags are {found or 'missing'}, not {' '.join(_FORMAT)}")
    ends = [0, *(tag.end() for tag in tags)]
    starts = [*(tag.start() for tag in tags), len(completion)]
    before, think, between, answer, after = (
        completion[end:start] for end, start in zip(ends, starts)
    )
    for name, text in (
        ("before <think>", before),
        ("between the blocks", between),
        ("after </answer>", after),
    ):
        if text.strip():
            return Verdict("format", 0.0, f"text {name}: {excerpt(text.strip())}")
    for name, text in (("think", think), ("answer", answer)):
        if not visible(text):
            return Verdict("format", 0.0, f"the {name} block is empty")
    return Verdict("format", 1.0, "one think block, then one answer block, and nothing else")


def judge_accuracy(completion: str, answer: str) -> Verdict:
    """The accuracy rule; see `accuracy_reward`."""
    right = answer.strip().upper()
    if len(right) != 1 or right not in LETTERS:
        raise ValueError(
            f"the answer must be one letter, {LETTERS[0]} to {LETTERS[-1]}, not {excerpt(answer)}"
        )
    text = answer_text(completion)
    if text is None:
        return Verdict("accuracy", 0.0, "no <answer>...</answer> block")
    letter = parse_letter(text)
    if letter is None:
        why = f"the answer {excerpt(text)} chooses no single option letter"
        return Verdict("accuracy", 0.0, why)
    if letter != right:
        return Verdict("accuracy", 0.0, f"the answer chooses {letter}; {right} is right")
    if visible(text).upper() != right:
        why = f"the answer chooses {right} with something added: {excerpt(text)}"
        return Verdict("accuracy", 0.5, why)
    return Verdict("accuracy", 1.0, f"the answer is exactly {right}")
