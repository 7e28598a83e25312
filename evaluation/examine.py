"""One model, asked everything: its greedy answers, then the same questions with something
changed.
"""

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
    """The questions to train on, those to test on whose prompts fit, and what makes prompts of
    them. InputError for a wrong file, and if there is no question to test on.
    """
    train, _, questions = load_questions(config)
    if not questions:
        raise InputError(
            "there are no test questions: name question files by test_questions or --questions"
        )
    # Every model reads the questions as the base does: its tokenizer decides what fits.
    base = model_folder(config.model, weights=False)
    shape = read_config(base)
    encoder = prompt_encoder(load_vocabulary(base, shape), shape, config)
    questions, skipped, _ = encoder.select(questions)
    if skipped:
        print(f"{skipped} questions left out as longer than {config.max_prompt_tokens} tokens")
    return train, questions, encoder


def probe_names(config: Config, samples: int) -> list[str]:
    """All that a model is asked; the last is the sampling of `samples` answers, if there is any."""
    sampling = f"{samples} samples at {config.temperature:g}, seed {config.seed}"
    return [*PROBES, sampling] if samples else [*PROBES]


def examine(name: str, folder: Path, records: Records, config: Config, samples: int = 0) -> None:
    """Ask the model in `folder` whatever has no row yet; nothing is loaded if all have.

    Args:
        name: what its rows call it.
        samples: answers to draw for each question, besides the greedy one.

    Raises:
        InputError: the folder holds no model that can be used, or one whose prompts would be
            others.
    """
    probes = probe_names(config, samples)
    # A model of gigabytes is not loaded to be asked nothing.
    if not any(records.missing(name, probe) for probe in probes):
        return
    # The questions fit; with another question's image a prompt may become longer than they may be.
    examinee = load_examinee(folder, replace(config, max_prompt_tokens=sys.maxsize))
    if prompt_digest(examinee.encoder) != records.terms["prompt"]:
        raise InputError(
            f"{name}: not comparable, the chat template in {folder} is not that of the base model"
        )
    questions = records.questions
    rotated = list(map(with_rotated_options, questions))
    # Name, what is recorded of the answers, what is asked, how many samples, how images are read.
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
    """Force an answer after each share of the model's own reasoning, and after another question's,
    for each question that has no such row yet.
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
        # One forward for each share, of the whole batch: openings of like length, little padding.
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
    """The letter that the chosen option has in the order of the question itself."""
    row = _letter(question, answers)
    return row | {"letter": original_letter(row["letter"], len(question.options))}


def _letters(question: Question, answers: list[Answer]) -> Row:
    return {"letters": [read_letter(answer.text) for answer in answers]}
