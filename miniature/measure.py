"""What the base can and does do, measured on phantoms that no stage trains on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from data import Prompt, Question
from data.vocabulary import Vocabulary
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL
from model.rope import mrope_positions
from rewards import format_reward, read_letter

from .lessons import Teacher
from .phantoms import ATTRIBUTES, MODALITIES
from .pool import draw_pool, grey_patches
from .questions import ask, right_option
from .words import LETTERS, STATEMENTS

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
    def right(self) -> bool:
        """Read as evaluation reads: the letter may stand without tags."""
        return read_letter(self.text) == self.question.answer

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
    results = {}
    for modality, prompts in check_prompts(model, vocabulary, seed).items():
        chances = [1 / len(prompt.question.options) for prompt in prompts]
        counts = {"questions": len(prompts), "chance (1 / options)": _mean(chances)}
        forced = forced_rates(model, vocabulary, prompts)
        results[modality] = counts | forced | _free_rates(model, vocabulary, prompts, seed)
    return results


def check_prompts(model: Qwen2VL, vocabulary: Vocabulary, seed: int) -> dict[str, list[Prompt]]:
    """By modality, one question for each image of a stream that nothing is trained on."""
    teacher = Teacher(vocabulary.tokenizer, seed)
    prompts: dict[str, list[Prompt]] = {modality: [] for modality in MODALITIES}
    for row, (image, case) in enumerate(draw_pool(seed, "base-check", CHECK_IMAGES)):
        question = ask(case, random.Random(f"{seed}/check/{row}"))
        tokens_P = torch.tensor(teacher.prompt(question))
        patches, grids = grey_patches([image])
        positions = mrope_positions(tokens_P, grids, model.config)
        prompts[case.modality].append(Prompt(question, tokens_P, patches, grids, positions))
    return prompts


def forced_rates(model: Qwen2VL, vocabulary: Vocabulary, prompts: list[Prompt]) -> Rates:
    """What the model could do: the way of answering is decided for it."""
    allowed_V = torch.zeros_like(vocabulary.allowed_V)
    for letter in LETTERS:
        allowed_V[vocabulary.encode(letter)] = True
    only_letters = replace(vocabulary, allowed_V=allowed_V)
    tagged, started = [], []
    for prompt in prompts:
        # The beginning of a thought on topic: "<think>The finding is".
        thought = STATEMENTS[prompt.question.question_type][0].removesuffix(" {}.")
        tagged.append(prompt.continued(vocabulary.encode("<answer>")))
        started.append(prompt.continued(vocabulary.encode("<think>" + thought)))
    thoughts = _answers(model, vocabulary, started)
    bare = _answers(model, only_letters, prompts, tokens=1)
    in_tags = _answers(model, only_letters, tagged, tokens=1)
    rates = {
        "made to give a letter: right": _right(bare),
        "made to give a letter in tags: right": _right(in_tags),
        "made to think on topic: right": _right(thoughts),
    }
    for attribute in ATTRIBUTES:
        named = []
        for answer in thoughts:
            if answer.question.question_type == attribute:
                named.append(answer.text.startswith(f" {right_option(answer.question)}."))
        rates[f"made to think on topic: names the {attribute}"] = _mean(named)
    return rates


def _free_rates(model: Qwen2VL, vocabulary: Vocabulary, prompts: list[Prompt], seed: int) -> Rates:
    """What the model does by itself, greedily and sampled at temperature 1."""
    answers = _answers(model, vocabulary, prompts)
    think = vocabulary.encode("<think>")
    thoughts = _answers(model, vocabulary, [prompt.continued(think) for prompt in prompts])
    noise = sampling_noise(seed, 0, range(len(prompts)), SAMPLES, MAX_NEW_TOKENS)
    sampled = _answers(model, vocabulary, prompts, noise)
    topical = [answer for answer in sampled if answer.on_topic]
    return {
        "greedy: right": _right(answers),
        "greedy: format followed": _mean([answer.formatted for answer in answers]),
        "greedy after `<think>`: right": _right(thoughts),
        "sampled: right": _right(sampled),
        "sampled: format followed": _mean([answer.formatted for answer in sampled]),
        "sampled: format followed and on topic": len(topical) / len(sampled),
        "of these: right": _right(topical),
    }


def _answers(
    model: Qwen2VL,
    vocabulary: Vocabulary,
    prompts: list[Prompt],
    noise_NGT: Tensor | None = None,
    tokens: int = MAX_NEW_TOKENS,
) -> list[Answer]:
    """One greedy answer to each question, or with noise G answers sampled at temperature 1."""
    answers = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="measuring", leave=False):
        batch = slice(start, start + BATCH)
        noise = None if noise_NGT is None else noise_NGT[batch]
        rollout = sample_groups(model, vocabulary, prompts[batch], noise, max_new_tokens=tokens)
        for prompt, texts in zip(prompts[batch], rollout.texts, strict=True):
            answers += [Answer(text, prompt.question) for text in texts]
    return answers


def _right(answers: list[Answer]) -> float:
    return _mean([answer.right for answer in answers])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
