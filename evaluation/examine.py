"""One model, asked everything: its greedy answers, then the same questions with something
changed.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.config import Config
from common.errors import InputError
from data import Prompt, PromptEncoder, Question, Vocabulary, load_vocabulary
from data.choice import prompt_encoder
from model import Qwen2VL, load_model
from rewards import read_letter, score, think_text

from .answers import Answer, answer_questions
from .audits.conclusion import conclusion
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
SWAPPED = "another's"


def kept_label(kept: float) -> str:
    """What rows call the answer after this share of the reasoning."""
    return f"{100 * kept:.0f} %"


WHOLE = kept_label(1.0)


def probes_asked(config: Config, samples: int) -> tuple[str, ...]:
    """All that a model is asked, by name: the plain questions first, samples (if there are any)
    last.
    """
    sampled = (
        [f"{samples} samples at {config.temperature:g}, seed {config.seed}"] if samples else []
    )
    return (PLAIN, *NO_IMAGE, ROTATED, REASONING, *sampled)


def question_ids(questions: Sequence[Question]) -> list[str]:
    """What rows call the questions: where each was read; with a number behind it if two files have
    one name.
    """
    seen: Counter[str] = Counter()
    names = []
    for question in questions:
        seen[question.source] += 1
        count = seen[question.source]
        names.append(question.source if count == 1 else f"{question.source} ({count})")
    return names


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
    """Ask the model in `folder` whatever has no row yet: answers go to `predictions`, all else to
    `probes`.

    Args:
        name: what its rows call it.
        terms: the contract.
        ids: the questions' names in the rows.
        samples: answers to draw for each question, besides the greedy one.

    Raises:
        InputError: the folder holds no model that can be used, or one whose prompts would be
            others.
    """
    asked = probes_asked(config, samples)
    if not any(
        (predictions if probe == PLAIN else probes).missing(name, probe, len(questions))
        for probe in asked
    ):
        return
    model = load_model(folder, config.device, config.dtype).requires_grad_(False)
    vocabulary = load_vocabulary(folder, model.config, config.device)
    # The questions fit; with another question's image a prompt may become longer than they may be.
    encoder = prompt_encoder(
        vocabulary, model.config, replace(config, max_prompt_tokens=sys.maxsize)
    )
    if prompt_digest(encoder) != terms["prompt"]:
        raise InputError(
            f"{name}: not comparable, the chat template in {folder} is not that of the base model"
        )
    answers = partial(answer_questions, model, vocabulary, encoder, config=config)

    def ask(
        probe: str,
        records: Records,
        row_of: Callable[[Question, list[Answer]], Row],
        changed: Sequence[Question] = questions,
        **how: Any,
    ) -> None:
        left = records.missing(name, probe, len(questions))
        for batch in answers(changed, label=f"{name}: {probe}", places=left, **how):
            rows = ({"id": ids[i], "place": i} | row_of(questions[i], given) for i, given in batch)
            records.add({"model": name, "probe": probe} | row for row in rows)

    ask(PLAIN, predictions, _prediction)
    ask("blank image", probes, _letter, load=blank_image)
    ask("noise image", probes, _letter, load=noise_image)
    ask("other image", probes, _letter, with_other_images(questions))
    ask(
        ROTATED, probes, _rotated_letter, [with_rotated_options(question) for question in questions]
    )
    if samples:
        ask(asked[-1], probes, _letters, samples=samples)
    answer_after_reasonings(
        name, model, vocabulary, encoder, config, questions, ids, predictions, probes
    )


def answer_after_reasonings(
    name: str,
    model: Qwen2VL,
    vocabulary: Vocabulary,
    encoder: PromptEncoder,
    config: Config,
    questions: Sequence[Question],
    ids: Sequence[str],
    predictions: Records,
    probes: Records,
) -> None:
    """Force an answer after each part of the model's own reasoning, and after another
    question's.
    """
    reasonings = [
        think_text(row["completion"]) for row in predictions.of(name, PLAIN, len(questions))
    ]
    swapped = swapped_reasoning(reasonings)
    left = probes.missing(name, REASONING, len(questions))
    with tqdm(
        total=len(left),
        desc=f"{name}: {REASONING}",
        unit="question",
        dynamic_ncols=True,
        leave=False,
    ) as bar:
        for start in range(0, len(left), config.eval_batch_prompts):
            places = left[start : start + config.eval_batch_prompts]
            rows = {i: {"letters": {}} for i in places}
            reasoned = [i for i in places if reasonings[i] is not None]
            if reasoned:
                prompts = [encoder.encode(questions[i]) for i in reasoned]
                texts = {
                    kept_label(kept): [shortened(reasonings[i], kept) for i in reasoned]
                    for kept in KEPT
                }
                letters = forced_letters(
                    model, vocabulary, prompts, texts | {SWAPPED: [swapped[i] for i in reasoned]}
                )
                for i, by_label in zip(reasoned, letters, strict=True):
                    rows[i] = {
                        "letters": by_label,
                        "swapped": conclusion(swapped[i], questions[i].options),
                    }
            probes.add(
                {"model": name, "probe": REASONING, "id": ids[i], "place": i} | rows[i]
                for i in places
            )
            bar.update(len(places))


def forced_letters(
    model: Qwen2VL,
    vocabulary: Vocabulary,
    prompts: Sequence[Prompt],
    reasonings: dict[str, list[str]],
) -> list[dict[str, str]]:
    """For each prompt the likeliest letter after each of its reasonings, by their labels."""
    letters: list[dict[str, str]] = [{} for _ in prompts]
    for label, texts in reasonings.items():
        logps = letter_logprobs(model, vocabulary, prompts, [opening(text) for text in texts])
        for by_label, by_letter in zip(letters, logps, strict=True):
            by_label[label] = max(by_letter, key=by_letter.__getitem__)
    return letters


def _prediction(question: Question, answers: list[Answer]) -> Row:
    (answer,) = answers
    verdicts = score(answer.text, question.answer)
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
        "rewards": {
            verdict.rule: {"score": verdict.score, "why": verdict.why} for verdict in verdicts
        },
    }


def _letter(question: Question, answers: list[Answer]) -> Row:
    return {"letter": read_letter(answers[0].text), "completion": answers[0].text}


def _rotated_letter(question: Question, answers: list[Answer]) -> Row:
    """The letter that the chosen option has in the order of the question itself."""
    row = _letter(question, answers)
    return row | {"letter": original_letter(row["letter"], len(question.options))}


def _letters(question: Question, answers: list[Answer]) -> Row:
    return {"letters": [read_letter(answer.text) for answer in answers]}
