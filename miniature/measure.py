"""What the base can and does do, measured on phantoms that no stage trains on."""

import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import Prompt
from data.vocabulary import Vocabulary
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL
from model.rope import mrope_positions
from rewards import accuracy_reward, format_reward

from .lessons import Teacher
from .phantoms import ATTRIBUTES, MODALITIES
from .pool import Pool, draw_pool, grey_patches
from .questions import Asked, ask
from .words import STATEMENTS

CHECK_IMAGES = 1000
SAMPLES, MAX_NEW_TOKENS = 4, 40


@dataclass(frozen=True)
class Item:
    asked: Asked
    prompt: Prompt
    forced: Prompt  # goes on with the beginning of a thought on topic: "<think>The finding is"


def measure(model: Qwen2VL, vocabulary: Vocabulary, seed: int) -> dict[str, dict[str, float]]:
    """Rates by modality; `n` is the number of questions, one an image.

    - `zero-shot`: greedy answers that are right; `format`: samples at temperature 1 that follow the
      format;
    - `on topic`: samples that follow the format and name a value of what is asked; `letter`: those
      of them right;
    - `names ...` and `forced letter`: with the thought's first words given, is the value named, is
      the letter, right?
    """
    pool = draw_pool(seed, "base-check", CHECK_IMAGES)
    teacher = Teacher(vocabulary.tokenizer, seed)
    results = {}
    for modality in MODALITIES:
        rows = [row for row, case in enumerate(pool.cases) if case.modality == modality]
        items = [
            _item(model, teacher, pool, row, random.Random(f"{seed}/check/{row}")) for row in rows
        ]
        as_is, forced = _as_is(model, vocabulary, items, seed), _forced(model, vocabulary, items)
        results[modality] = {"n": len(items), **as_is, **forced}
    return results


def _item(model: Qwen2VL, teacher: Teacher, pool: Pool, row: int, rng: random.Random) -> Item:
    asked = ask(pool.cases[row], rng)
    patches, grids = grey_patches(pool.images([row]))
    beginning = "<think>" + STATEMENTS[asked.attribute][0].removesuffix(" {}.")

    def prompt(tokens: list[int]) -> Prompt:
        ids = torch.tensor(tokens)
        return Prompt(
            None, ids, patches, grids, mrope_positions(ids, grids, model.config.image_token_id)
        )

    tokens = teacher.prompt(asked)
    return Item(asked, prompt(tokens), prompt(tokens + teacher.encode(beginning)))


def _as_is(
    model: Qwen2VL, vocabulary: Vocabulary, items: list[Item], seed: int
) -> dict[str, float]:
    greedy = _complete(model, vocabulary, [item.prompt for item in items], 1, None)
    right = [accuracy_reward(texts[0], item.asked.letter) > 0 for texts, item in zip(greedy, items)]
    sampled = _complete(model, vocabulary, [item.prompt for item in items], SAMPLES, seed)
    pairs = [(text, item.asked) for texts, item in zip(sampled, items) for text in texts]
    formatted = [(text, asked) for text, asked in pairs if format_reward(text)]
    topical = [(text, asked) for text, asked in formatted if _names(text, asked.attribute)]
    return {
        "chance": _mean([1 / len(item.asked.options) for item in items]),
        "zero-shot": _mean(right),
        "greedy format": _mean([format_reward(texts[0]) for texts in greedy]),
        "sampled right": _mean([accuracy_reward(text, asked.letter) > 0 for text, asked in pairs]),
        "format": len(formatted) / len(pairs),
        "on topic": len(topical) / len(pairs),
        "letter": _mean([accuracy_reward(text, asked.letter) > 0 for text, asked in topical]),
    }


def _forced(model: Qwen2VL, vocabulary: Vocabulary, items: list[Item]) -> dict[str, float]:
    texts = [
        group[0] for group in _complete(model, vocabulary, [item.forced for item in items], 1, None)
    ]
    said = [(text, item.asked) for text, item in zip(texts, items)]
    rates = {}
    for attribute in ATTRIBUTES:
        about = [
            text.startswith(f" {asked.answer}.")
            for text, asked in said
            if asked.attribute == attribute
        ]
        rates[f"names {attribute}"] = _mean(about)
    right = [accuracy_reward(text, asked.letter) > 0 for text, asked in said]
    return {**rates, "forced letter": _mean(right)}


def _complete(
    model: Qwen2VL, vocabulary: Vocabulary, prompts: list[Prompt], group: int, seed: int | None
) -> list[list[str]]:
    """Completions of each prompt: greedy if there is no seed, else at temperature 1."""
    texts = []
    for start in tqdm(range(0, len(prompts), 50), desc="measuring", leave=False):
        part = prompts[start : start + 50]
        places = range(start, start + len(part))
        noise = None if seed is None else sampling_noise(seed, 0, places, group, MAX_NEW_TOKENS)
        texts += sample_groups(model, vocabulary, part, noise, max_new_tokens=MAX_NEW_TOKENS).texts
    return texts


def _names(text: str, attribute: str) -> bool:
    thought = text.split("</think>")[0].replace(".", " ")
    return any(value in thought.split() for value in ATTRIBUTES[attribute])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
