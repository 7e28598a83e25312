"""One model, asked everything: its greedy answers, then the same questions with something changed."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import Question, load_image, load_vocabulary
from data.encode import LoadImage
from grpo.config import Config
from grpo.run import prompt_encoder
from model import InputError, load_model
from rewards import read_letter, score, think_text

from .answers import Answer, answer_questions
from .contract import prompt_digest
from .probes import (
    KEPT,
    blank_image,
    letter_logprobs,
    noise_image,
    opening,
    original_letter,
    shortened,
    swapped_reasoning,
    with_other_images,
    with_rotated_options,
)
from .records import Records, Row

PLAIN, REASONING = "plain", "reasoning"
NO_IMAGE = ("blank image", "noise image", "other image")
ROTATED = "permuted options"
WHOLE, SWAPPED = "100 %", "swapped"


def question_ids(questions: Sequence[Question]) -> list[str]:
    """What rows call the questions: where each was read; with a number behind it if two files have one name."""
    seen: Counter[str] = Counter()
    names = []
    for question in questions:
        seen[question.source] += 1
        count = seen[question.source]
        names.append(question.source if count == 1 else f"{question.source} ({count})")
    return names


def probes_asked(samples: int) -> tuple[str, ...]:
    """All that a model is asked, by name: the plain questions first, samples (if there are any) last."""
    return (PLAIN, *NO_IMAGE, ROTATED, REASONING, *([f"{samples} samples"] if samples else []))


def examine(
    name: str,
    folder: Path,
    config: Config,
    terms: dict[str, Any],
    questions: Sequence[Question],
    ids: Sequence[str],
    predictions: Records,
    probes: Records,
    samples: int = 0,
) -> None:
    """Ask the model in `folder` whatever has no row yet: answers go to `predictions`, all else to `probes`.

    Args:
        name: what its rows call it.
        terms: the contract.
        ids: the questions' names in the rows.
        samples: answers to draw for each question, besides the greedy one.

    Raises:
        InputError: the folder holds no model that can be used, or one whose prompts would be others.
    """
    asked = probes_asked(samples)
    if not any((predictions if probe == PLAIN else probes).missing(name, probe, ids) for probe in asked):
        return
    model = load_model(folder, config.device, config.dtype).requires_grad_(False)
    vocabulary = load_vocabulary(folder, model.config, config.device)
    # The questions fit; with another question's image a prompt may become longer than they may be.
    encoder = prompt_encoder(vocabulary, model.config, replace(config, max_prompt_tokens=sys.maxsize))
    if prompt_digest(encoder) != terms["prompt"]:
        raise InputError(f"{name}: not comparable, the chat template in {folder} is not that of the base model")
    answers = partial(answer_questions, model, vocabulary, encoder, config=config)

    def ask(
        probe: str,
        records: Records,
        row_of: Callable[[Question, list[Answer]], Row],
        changed: Sequence[Question] = questions,
        **how: Any,
    ) -> None:
        left = records.missing(name, probe, ids)
        for batch in answers([changed[i] for i in left], label=f"{name}: {probe}", **how):
            known = {"model": name, "probe": probe}
            records.add(known | {"id": ids[left[i]]} | row_of(questions[left[i]], given) for i, given in batch)

    ask(PLAIN, predictions, _prediction)
    ways: dict[str, tuple[LoadImage, Sequence[Question]]] = {
        "blank image": (blank_image, questions),
        "noise image": (noise_image, questions),
        "other image": (load_image, with_other_images(questions, config.seed)),
    }
    for probe in NO_IMAGE:
        load, changed = ways[probe]
        ask(probe, probes, _letter, changed, load=load)
    ask(ROTATED, probes, _rotated_letter, [with_rotated_options(question) for question in questions])
    if samples:
        ask(asked[-1], probes, _letters, samples=samples)

    # The answers that follow from parts of its reasoning, and from another question's.
    reasonings = [think_text(row["completion"]) for row in predictions.of(name, PLAIN, ids)]
    swapped = swapped_reasoning(reasonings, config.seed)
    left = probes.missing(name, REASONING, ids)
    with tqdm(total=len(left), desc=f"{name}: {REASONING}", unit="question", dynamic_ncols=True, leave=False) as bar:
        for start in range(0, len(left), config.eval_batch_prompts):
            places = left[start : start + config.eval_batch_prompts]
            reasoned = [i for i in places if reasonings[i] is not None]
            letters: dict[int, dict[str, str]] = {i: {} for i in places}
            prompts = [encoder.encode(questions[i]) for i in reasoned]
            given = {f"{kept:.0%}".replace("%", " %"): [shortened(reasonings[i], kept) for i in reasoned] for kept in KEPT}
            for label, texts in (given | {SWAPPED: [swapped[i] for i in reasoned]}).items():
                if reasoned:
                    logps = letter_logprobs(model, vocabulary, prompts, [opening(text) for text in texts])
                    for i, by_letter in zip(reasoned, logps, strict=True):
                        letters[i][label] = max(by_letter, key=by_letter.__getitem__)
            probes.add({"model": name, "probe": REASONING, "id": ids[i], "letters": letters[i]} for i in places)
            bar.update(len(places))


def _prediction(question: Question, answers: list[Answer]) -> Row:
    (answer,) = answers
    verdicts = score(answer.text, question.answer, question.options)
    return {
        "modality": question.modality,
        "question_type": question.question_type,
        "images": [str(image) for image in question.images],
        "question": question.question,
        "options": list(question.options),
        "ground_truth": question.answer,
        "completion": answer.text,
        "tokens": answer.tokens,
        "ended": answer.ended,
        "letter": read_letter(answer.text),
        "rewards": {verdict.rule: {"score": verdict.score, "why": verdict.why} for verdict in verdicts},
    }


def _letter(question: Question, answers: list[Answer]) -> Row:
    return {"letter": read_letter(answers[0].text), "completion": answers[0].text}


def _rotated_letter(question: Question, answers: list[Answer]) -> Row:
    """The letter that the chosen option has in the order of the question itself."""
    row = _letter(question, answers)
    return row | {"letter": original_letter(row["letter"], len(question.options))}


def _letters(question: Question, answers: list[Answer]) -> Row:
    return {"letters": [read_letter(answer.text) for answer in answers]}
