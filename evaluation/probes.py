"""Probes: ask the model again with one thing changed, to see what its answer depends on.

With the image removed (blank, noise, or another question's), the model is its own blind baseline.
With the options permuted, the content of the answer should stay the same. With the reasoning
truncated or swapped, an answer that rests on the reasoning should change; one that stays was
decided elsewhere (early answering and added mistakes of Lanham et al. 2023, "Measuring Faithfulness
in Chain-of-Thought Reasoning", arXiv 2307.13702). The probes can show that reasoning is unfaithful,
but cannot prove that it is faithful.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix

import torch

from data import Prompt, Question, Vocabulary
from grpo.rollout import MicroBatch, collate, completion_logprobs, padded
from model import Qwen2VL
from rewards import LETTERS, think_text

PLAIN = "plain"
REASONING = "reasoning"
ROTATED = "permuted options"
NO_IMAGE = ("blank image", "noise image", "other image")
PROBES = (PLAIN, *NO_IMAGE, ROTATED, REASONING)
"""The names of the probes: the plain questions, then each change."""
KEPT = {"0 %": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "100 %": 1.0}
"""Name in the rows -> share of the reasoning that is kept before an answer is forced."""
NONE = "0 %"
WHOLE = "100 %"
SWAPPED = "swapped"


def with_rotated_options(question: Question) -> Question:
    """The question with each option moved up by one place, the first to the end, and `answer`
    changed accordingly.
    """
    first, *others = question.options
    letters = LETTERS[: len(question.options)]
    answer = letters[letters.index(question.answer) - 1]  # A goes to the end
    return replace(question, options=(*others, first), answer=answer)


def original_letter(letter: str | None, count: int) -> str | None:
    """The letter, before `with_rotated_options`, of the option that `letter` names afterwards.

    `count` is the number of options. None for None and for a letter without an option.
    """
    if letter is None or letter not in LETTERS[:count]:
        return None
    return LETTERS[(LETTERS.index(letter) + 1) % count]


def truncated(reasoning: str, kept: float) -> str:
    """The first words of a reasoning, a share `kept` (0 to 1); 1 keeps trailing space as well."""
    if kept == 1:
        return reasoning
    ends = [0, *(word.end() for word in re.finditer(r"\S+", reasoning))]
    return reasoning[: ends[round(kept * (len(ends) - 1))]]


def swapped_reasonings(reasonings: dict[int, str]) -> dict[int, str]:
    """Each reasoning, by place, replaced by another question's with a different text, if there is
    one.
    """
    places = list(reasonings)
    # Neighbours in the file are often similar: the same modality, even the same image.
    random.Random("swapped reasoning").shuffle(places)
    swapped = dict(reasonings)
    for at, place in enumerate(places):
        for other in places[at + 1 :] + places[:at]:
            if reasonings[other] != reasonings[place]:
                swapped[place] = reasonings[other]
                break
    return swapped


def opening(reasoning: str) -> str:
    """The start of a completion in the requested format, up to its letter."""
    return f"<think>{reasoning}</think><answer>"


def opening_of(completion: str) -> str:
    """A completion's text up to its letter; without an answer tag, its reasoning and the tag."""
    before, tag, _ = completion.partition("<answer>")
    return before + tag if tag else opening(think_text(completion) or "")


@torch.no_grad()
def letter_logprobs(
    model: Qwen2VL, vocabulary: Vocabulary, prompts: Sequence[Prompt], openings: Sequence[str]
) -> list[dict[str, float]]:
    """Force an answer: for each prompt, log pi of each option's letter and the closing tag after
    the prompt and the opening.
    """
    continued = []
    endings = []
    for prompt, text in zip(prompts, openings, strict=True):
        # Tokenise each letter together with the opening, because a tokenizer may merge across the
        # boundary. The common prefix becomes part of the prompt; the rest is a group of
        # completions.
        letters = LETTERS[: len(prompt.question.options)]
        ids = [vocabulary.encode(f"{text}{letter}</answer>") for letter in letters]
        common = commonprefix(ids)  # made for paths, but works on any lists
        continued.append(prompt.continued(common))
        endings.append([row[len(common) :] for row in ids])
    device = model.embed.weight.device
    tokens_NGT, mask_NGT = padded(endings, vocabulary.end_ids[0], device)
    batch = MicroBatch(slice(None), collate(continued, device), tokens_NGT, mask_NGT)
    logp_NGT, _ = completion_logprobs(model, batch, vocabulary.allowed_V, temperature=1.0)
    logprobs = []
    for group, logp_G in zip(endings, logp_NGT.sum(-1).tolist(), strict=True):
        # Groups are padded to the largest; keep only the question's own letters.
        logprobs.append(dict(zip(LETTERS, logp_G[: len(group)], strict=False)))
    return logprobs
