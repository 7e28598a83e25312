"""What an answer depends on: the same model asked again with something changed.

Each probe changes one thing and looks at the letter that comes out. With the image taken away
(blank, noise, another question's), the model is its own blind baseline. With the options in another
order, the content of the answer should stay. With the reasoning cut short or exchanged, an answer
that rests on the reasoning should change; one that stays was decided elsewhere (early answering and
added mistakes of Lanham et al. 2023, "Measuring Faithfulness in Chain-of-Thought Reasoning", arXiv
2307.13702). None of this can prove that reasoning is faithful; it can show that it is not.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Prompt, Question, Vocabulary, load_image, option_letter
from grpo.rollout import MicroBatch, collate, completion_logprobs, padded
from model import Qwen2VL
from rewards import think_text

KEPT = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the reasoning after which the answer is asked for; the last is the whole reasoning."""


def blank_image(path: Path) -> Image.Image:
    """A grey image of the same size: the prompt stays as long as it was."""
    return Image.new("RGB", load_image(path).size, (128, 128, 128))


def noise_image(path: Path) -> Image.Image:
    """Uniform noise of the same size, the same each time for a file of that name."""
    width, height = load_image(path).size
    rng = np.random.default_rng(list(path.name.encode()))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_other_images(questions: Sequence[Question]) -> list[Question]:
    """Every question with the images of another one of the list, of whatever modality.

    All images are still used, and nobody keeps its own, unless all questions show the same.
    """
    shown = list(dict.fromkeys(question.images for question in questions))
    random.Random("other image").shuffle(shown)
    other = dict(zip(shown, shown[1:] + shown[:1], strict=True))  # one cycle through them all
    return [replace(question, images=other[question.images]) for question in questions]


def with_rotated_options(question: Question) -> Question:
    """The same options, each moved up by one place, the first to the end; `answer` moves along."""
    count = len(question.options)
    place = (ord(question.answer) - ord("A") - 1) % count
    return replace(
        question, options=question.options[1:] + question.options[:1], answer=option_letter(place)
    )


def original_letter(letter: str | None, count: int) -> str | None:
    """The letter that an option of `with_rotated_options` had before, among `count` options; None
    stays None.
    """
    place = ord(letter) - ord("A") if letter else count
    return option_letter((place + 1) % count) if place < count else None


def shortened(reasoning: str, kept: float) -> str:
    """The first `kept` (0 to 1) of a reasoning's words."""
    words = list(re.finditer(r"\S+", reasoning))
    count = round(kept * len(words))
    return reasoning if kept == 1 else reasoning[: words[count - 1].end()] if count else ""


def swapped_reasoning(reasonings: Sequence[str | None]) -> list[str | None]:
    """Every reasoning replaced by another question's, one that reads differently where there is
    one; None stays.
    """
    places = [i for i, reasoning in enumerate(reasonings) if reasoning is not None]
    random.Random("swapped reasoning").shuffle(places)
    swapped: list[str | None] = [None] * len(reasonings)
    for at, i in enumerate(places):
        others = (reasonings[places[(at + shift) % len(places)]] for shift in range(1, len(places)))
        swapped[i] = next((other for other in others if other != reasonings[i]), reasonings[i])
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

    Each opening is tokenised together with each letter, because a tokenizer may join what is on
    either side; what the options' tokens have in common becomes part of the prompt, and what
    differs is a group of completions.
    """
    shared, tails = [], []
    for prompt, text in zip(prompts, openings, strict=True):
        letters = [option_letter(i) for i in range(len(prompt.question.options))]
        rows = [vocabulary.encode(f"{text}{letter}</answer>") for letter in letters]
        common = next(i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
        shared.append(prompt.continued(rows[0][:common]))
        tails.append([row[common:] for row in rows])
    device = model.embed.weight.device
    tokens_NGT, mask_NGT = padded(tails, vocabulary.end_ids[0], device)
    batch = MicroBatch(slice(None), collate(shared, device), tokens_NGT, mask_NGT)
    logp_NGT, _ = completion_logprobs(model, batch, vocabulary.allowed_V, 1.0)
    totals = logp_NGT.sum(-1).tolist()
    return [
        {option_letter(g): row[g] for g in range(len(group))}
        for row, group in zip(totals, tails, strict=True)
    ]
