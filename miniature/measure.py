"""What the base can and does do, measured on phantoms that no stage trains on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Prompt, Question
from data.vocabulary import Vocabulary
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL
from model.rope import mrope_positions
from rewards import accuracy_reward, format_reward

from .lessons import Teacher
from .phantoms import ATTRIBUTES, MODALITIES
from .pool import draw_pool, grey_patches
from .questions import ask, right_option
from .words import STATEMENTS

CHECK_IMAGES = 1000
SAMPLES = 4  # answers to a question at temperature 1
MAX_NEW_TOKENS = 40
BATCH = 50  # prompts that are answered at once

Rates = dict[str, float]


@dataclass(frozen=True)
class Answer:
    text: str
    question: Question

    @property
    def formatted(self) -> bool:
        return format_reward(self.text) > 0

    @property
    def on_topic(self) -> bool:
        """Follows the format, and the thought names a value of the attribute in question."""
        thought = self.text.split("</think>")[0].replace(".", " ").split()
        values = ATTRIBUTES[self.question.question_type]
        return self.formatted and not set(thought).isdisjoint(values)


def measure(model: Qwen2VL, vocabulary: Vocabulary, seed: int) -> dict[str, Rates]:
    """The model card's numbers by modality: how many questions, one an image, and rates in 0..1."""
    teacher = Teacher(vocabulary.tokenizer, seed)
    pool = draw_pool(seed, "base-check", CHECK_IMAGES)
    answer = partial(_answers, model, vocabulary)
    results = {}
    for modality in MODALITIES:
        prompts = []
        started = []
        for row, (image, case) in enumerate(pool):
            if case.modality == modality:
                question = ask(case, random.Random(f"{seed}/check/{row}"))
                prompt = _prompt(model, teacher, image, question)
                # The beginning of a thought on topic: "<think>The finding is".
                thought = STATEMENTS[question.question_type][0].removesuffix(" {}.")
                prompts.append(prompt)
                started.append(prompt.continued(teacher.encode("<think>" + thought)))
        noise = sampling_noise(seed, 0, range(len(prompts)), SAMPLES, MAX_NEW_TOKENS)
        results[modality] = _rates(answer(prompts), answer(prompts, noise), answer(started))
    return results


def _prompt(model: Qwen2VL, teacher: Teacher, image: np.ndarray, question: Question) -> Prompt:
    tokens = torch.tensor(teacher.prompt(question))
    patches, grids = grey_patches([image])
    positions = mrope_positions(tokens, grids, model.config)
    return Prompt(question, tokens, patches, grids, positions)


def _answers(
    model: Qwen2VL, vocabulary: Vocabulary, prompts: list[Prompt], noise_NGT: Tensor | None = None
) -> list[Answer]:
    """One greedy answer to each question, or with noise G answers sampled at temperature 1."""
    answers = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="measuring", leave=False):
        batch = slice(start, start + BATCH)
        noise = None if noise_NGT is None else noise_NGT[batch]
        rollout = sample_groups(
            model, vocabulary, prompts[batch], noise, max_new_tokens=MAX_NEW_TOKENS
        )
        for prompt, texts in zip(prompts[batch], rollout.texts, strict=True):
            answers += [Answer(text, prompt.question) for text in texts]
    return answers


def _rates(greedy: list[Answer], sampled: list[Answer], started: list[Answer]) -> Rates:
    topical = [answer for answer in sampled if answer.on_topic]
    rates = {
        "questions": len(greedy),
        "chance (1 / options)": _mean([1 / len(answer.question.options) for answer in greedy]),
        "greedy: right letter": _right(greedy),
        "greedy: format followed": _mean([answer.formatted for answer in greedy]),
        "sampled: right letter": _right(sampled),
        "sampled: format followed": _mean([answer.formatted for answer in sampled]),
        "sampled: format followed and on topic": len(topical) / len(sampled),
        "of these: right letter": _right(topical),
    }
    for attribute in ATTRIBUTES:
        named = []
        for answer in started:
            if answer.question.question_type == attribute:
                named.append(answer.text.startswith(f" {right_option(answer.question)}."))
        rates[f"given a start: names the {attribute}"] = _mean(named)
    return rates | {"given a start: right letter": _right(started)}


def _right(answers: list[Answer]) -> float:
    return _mean([accuracy_reward(answer.text, answer.question.answer) > 0 for answer in answers])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
