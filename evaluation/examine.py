"""Run all probes on one model: the plain questions, then the same with one thing changed."""

import sys
from dataclasses import replace
from pathlib import Path

from common.config import Config
from common.errors import InputError
from common.hub import model_folder
from data import PromptEncoder, Question, load_image, load_vocabulary
from data.choice import load_questions, prompt_encoder
from data.unseeing import blank_image, noise_image, with_other_images
from model import read_config
from rewards import read_letter, score, think_text

from .answers import Answer, Examinee, in_batches, load_examinee
from .audits.conclusion import conclusion
from .contract import prompt_digest
from .probes import (
    KEPT,
    PLAIN,
    PROBES,
    REASONING,
    ROTATED,
    SWAPPED,
    letter_logprobs,
    opening,
    original_letter,
    swapped_reasonings,
    truncated,
    with_rotated_options,
)
from .records import Records, Row


def chosen_questions(config: Config) -> tuple[list[Question], list[Question], PromptEncoder]:
    """The training questions, the test questions whose prompts fit, and the prompt encoder.

    Raises:
        InputError: a question file is wrong, or there are no test questions.
    """
    train, _, questions = load_questions(config)
    if not questions:
        raise InputError("there are no test questions: set test_questions or give --questions")
    # The base model's tokenizer decides which questions fit, for all models.
    base = model_folder(config.model, weights=False)
    shape = read_config(base)
    encoder = prompt_encoder(load_vocabulary(base, shape), shape, config)
    questions, skipped, _ = encoder.select(questions)
    if skipped:
        print(f"{skipped} questions left out: longer than {config.max_prompt_tokens} tokens")
    return train, questions, encoder


def probe_names(config: Config, samples: int) -> list[str]:
    """The names of all probes; the last is the sampling of `samples` answers, unless that is 0."""
    sampling = f"{samples} samples at {config.temperature:g}, seed {config.seed}"
    return [*PROBES, sampling] if samples else [*PROBES]


def examine(name: str, folder: Path, records: Records, config: Config, samples: int = 0) -> None:
    """Run every probe that has missing rows on the model in `folder`.

    Args:
        name: the model's name in the rows.
        samples: answers to sample for each question, besides the greedy one.

    Raises:
        InputError: the folder holds no usable model, or one with a different chat template.
    """
    probes = probe_names(config, samples)
    # Do not load gigabytes of weights if no row is missing.
    if not any(records.missing(name, probe) for probe in probes):
        return
    # The questions fit, but with another question's image a prompt may exceed the limit.
    examinee = load_examinee(folder, replace(config, max_prompt_tokens=sys.maxsize))
    if prompt_digest(examinee.encoder) != records.terms["prompt"]:
        raise InputError(
            f"{name}: not comparable, the chat template in {folder} differs from the base model's"
        )
    questions = records.questions
    rotated = list(map(with_rotated_options, questions))
    # Probe, function that makes its row, questions, samples per question, image loader.
    plan = [
        (PLAIN, _prediction, questions, 0, load_image),
        ("blank image", _letter, questions, 0, blank_image),
        ("noise image", _letter, questions, 0, noise_image),
        ("other image", _letter, with_other_images(questions), 0, load_image),
        (ROTATED, _rotated_letter, rotated, 0, load_image),
    ]
    if samples:
        plan.append((probes[-1], _letters, questions, samples, load_image))
    for probe, row_of, changed, count, load in plan:
        missing = records.missing(name, probe)
        for place, answers in examinee.answers(changed, f"{name}: {probe}", missing, count, load):
            records.add(name, probe, place, row_of(questions[place], answers))
    record_forced_letters(name, examinee, records)


def record_forced_letters(name: str, examinee: Examinee, records: Records) -> None:
    """Force an answer after each share of the model's own reasoning, and after another question's.

    Only questions without such a row are asked.
    """
    reasonings = {}
    for row in records.of(name):
        reasoning = think_text(row["completion"])
        if reasoning is not None:
            reasonings[row["place"]] = reasoning
    swapped = swapped_reasonings(reasonings)
    reasoned = []
    for place in records.missing(name, REASONING):
        if place in reasonings:
            reasoned.append(place)
        else:
            records.add(name, REASONING, place, {"letters": {}})
    size = examinee.config.eval_batch_prompts
    for places in in_batches(reasoned, size, f"{name}: {REASONING}"):
        questions = [records.questions[place] for place in places]
        prompts = list(map(examinee.encoder.encode, questions))
        letters: list[dict[str, str]] = [{} for _ in places]
        # One forward pass for each share: openings of similar length need little padding.
        for label in (*KEPT, SWAPPED):
            texts, kept = (swapped, 1.0) if label == SWAPPED else (reasonings, KEPT[label])
            openings = [opening(truncated(texts[place], kept)) for place in places]
            logprobs = letter_logprobs(examinee.model, examinee.vocabulary, prompts, openings)
            for own, by_letter in zip(letters, logprobs, strict=True):
                own[label] = max(by_letter, key=by_letter.__getitem__)
        for place, question, own in zip(places, questions, letters, strict=True):
            concluded = conclusion(swapped[place], question.options)
            records.add(name, REASONING, place, {"letters": own, "swapped": concluded})


def _prediction(question: Question, answers: list[Answer]) -> Row:
    (answer,) = answers
    verdicts = score(answer.text, question.answer)
    return {
        "modality": question.modality,
        "question_type": question.question_type,
        "images": list(map(str, question.images)),
        "question": question.question,
        "options": list(question.options),
        "ground_truth": question.answer,
        **_letter(question, answers),
        "tokens": answer.tokens,
        "ended": answer.ended,
        "rewards": {one.rule: {"score": one.score, "why": one.why} for one in verdicts},
    }


def _letter(question: Question, answers: list[Answer]) -> Row:
    return {"letter": read_letter(answers[0].text), "completion": answers[0].text}


def _rotated_letter(question: Question, answers: list[Answer]) -> Row:
    """The row of an answer to rotated options, its letter mapped back to the original order."""
    row = _letter(question, answers)
    return row | {"letter": original_letter(row["letter"], len(question.options))}


def _letters(question: Question, answers: list[Answer]) -> Row:
    return {"letters": [read_letter(answer.text) for answer in answers]}
