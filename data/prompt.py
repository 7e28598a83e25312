"""The one prompt template, used by training and evaluation alike.

It is the text of Figure 1 of MedVLM-R1 (arXiv 2502.19634). Departures from the code published with
the paper: there, a line break precedes the question, every line of the task is indented (by eight
spaces in training, by four in evaluation), some lines end in a space, and an indented empty line
closes the text. Here lines begin at the margin, nothing trails, and training and evaluation send
the same bytes.
"""

from rewards import LETTERS

from .question import Question

TASK = """\
Your task:
1. Think through the question step by step, enclose your reasoning process in <think>...</think> \
tags.
2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.
3. No extra information or text outside of these tags."""


def prompt_text(question: Question) -> str:
    """The user's words: the question, one line `A) ...` for each option, the task. Images are not
    part of it.
    """
    lettered = zip(LETTERS, question.options, strict=False)
    options = [f"{letter}) {option}" for letter, option in lettered]
    return "\n".join([question.question, *options, TASK])
