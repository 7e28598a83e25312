"""The prompt template, the same for training and evaluation.

It is the text of Figure 1 of MedVLM-R1 (arXiv 2502.19634). Departures from the code published with
the paper: there, the question follows a line break, every line of the task is indented (by eight
spaces in training, by four in evaluation), some lines end in a space, and the text ends with an
indented empty line. Here lines have no indentation and no trailing spaces, and training and
evaluation send the same bytes.
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
    """The text of the user's turn: the question, one line `A) ...` per option, the task."""
    lettered = zip(LETTERS, question.options, strict=False)
    options = [f"{letter}) {option}" for letter, option in lettered]
    return "\n".join([question.question, *options, TASK])
