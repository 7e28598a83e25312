"""What an answer depends on: the same model asked again with something changed.

Each probe changes one thing and looks at the letter that comes out. With the image taken away
(blank, noise, another question's), the model is its own blind baseline. With the options in another
order, the content of the answer should stay. With the reasoning truncated or exchanged, an answer
that rests on the reasoning should change; one that stays was decided elsewhere (early answering and
added mistakes of Lanham et al. 2023, "Measuring Faithfulness in Chain-of-Thought Reasoning", arXiv
2307.13702). None of this can prove that reasoning is faithful; it can show that it is not.
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
"""All that a model is asked, by name: the questions as they are, then with something changed."""
KEPT = {"0 %": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "100 %": 1.0}
"""Shares of the reasoning after which the answer is asked for, by what rows call them."""
NONE = "0 %"
WHOLE = "100 %"
SWAPPED = "another's"


def with_rotated_options(question: Question) -> Question:
    """The same options, each moved up by one place, the first to the end; `answer` moves along."""
    first, *others = question.options
    letters = LETTERS[: len(question.options)]
    answer = letters[letters.index(question.answer) - 1]  # A goes to the end
    return replace(question, options=(*others, first), answer=answer)


def original_letter(letter: str | None, count: int) -> str | None:
    """The letter that an option of `with_rotated_options` had before, among `count` options; None
    for None and for a letter that no option has.
    """
    if letter is None or letter not in LETTERS[:count]:
        return None
    return LETTERS[(LETTERS.index(letter) + 1) % count]


def truncated(reasoning: str, kept: float) -> str:
    """The first `kept` (0 to 1) of a reasoning's words; with 1 the blanks at its end stay too."""
    if kept == 1:
        return reasoning
    ends = [0, *(word.end() for word in re.finditer(r"\S+", reasoning))]
    return reasoning[: ends[round(kept * (len(ends) - 1))]]


def swapped_reasonings(reasonings: dict[int, str]) -> dict[int, str]:
    """By place every reasoning replaced by another question's, one that reads differently where
    there is one.
    """
    places = list(reasonings)
    # Neighbours in the file are often alike: of the same modality, even of the same image.
    random.Random("swapped reasoning").shuffle(places)
    swapped = dict(reasonings)
    for at, place in enumerate(places):
        for other in places[at + 1 :] + places[:at]:
            if reasonings[other] != reasonings[place]:
                swapped[place] = reasonings[other]
                break
    return swapped


def opening(reasoning: str) -> str:
    """A completion in the asked form, up to where its letter comes."""
    return f"<think>{reasoning}</think><answer>"


def opening_of(completion: str) -> str:
    """A completion's own text up to where its letter comes; its reasoning and then the tag, if it
    has no such place.
    """
    before, tag, _ = completion.partition("<answer>")
    return before + tag if tag else opening(think_text(completion) or "")


@torch.no_grad()
def letter_logprobs(
    model: Qwen2VL, vocabulary: Vocabulary, prompts: Sequence[Prompt], openings: Sequence[str]
) -> list[dict[str, float]]:
    """Force an answer: log pi of each option's letter, and the tag that closes it, after the prompt
    and the opening.
    """
    continued = []
    endings = []
    for prompt, text in zip(prompts, openings, strict=True):
        # Each letter is tokenised together with the opening, because a tokenizer may join what is
        # on either side. What all have in common becomes part of the prompt; what differs is a
        # group of completions.
        letters = LETTERS[: len(prompt.question.options)]
        ids = [vocabulary.encode(f"{text}{letter}</answer>") for letter in letters]
        common = commonprefix(ids)  # made for paths, but takes lists of anything
        continued.append(prompt.continued(common))
        endings.append([row[len(common) :] for row in ids])
    device = model.embed.weight.device
    tokens_NGT, mask_NGT = padded(endings, vocabulary.end_ids[0], device)
    batch = MicroBatch(slice(None), collate(continued, device), tokens_NGT, mask_NGT)
    logp_NGT, _ = completion_logprobs(model, batch, vocabulary.allowed_V, temperature=1.0)
    logprobs = []
    for group, logp_G in zip(endings, logp_NGT.sum(-1).tolist(), strict=True):
        # The batch is as wide as its largest group; each group ends where its own letters do.
        logprobs.append(dict(zip(LETTERS, logp_G[: len(group)], strict=False)))
    return logprobs
