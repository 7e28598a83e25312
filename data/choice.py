"""The questions of a run, and the encoder for its model, as the config selects them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.config import Config
from common.errors import InputError
from model import Qwen2VLConfig

from .encode import PromptEncoder
from .question import Question
from .readers import read_questions
from .subset import choose_questions, split_by_image
from .unseeing import with_other_images
from .vocabulary import Vocabulary


class Questions(NamedTuple):
    """Questions for training, validation and test."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]


def load_questions(config: Config) -> Questions:
    """Read and select the questions of a run.

    Validation and test questions are ordered by modality. Questions that are held out for
    validation are of `train_modality`.

    Raises:
        InputError: a file is invalid, or there are too few questions.
    """
    # Missing images may be skipped in training only: the other sets compare runs.
    train = read_questions(config.train_questions, config.image_dir, config.bad_images == "error")
    validation = _read_all(config.validation_questions, config.image_dir)
    test = _read_all(config.test_questions, config.image_dir)
    # Split off the test set first, so that it does not depend on whether a run validates.
    if config.test_fraction:
        train, held_out = split_by_image(train, config.test_fraction, config.seed)
        test += held_out
    if config.validation_fraction:
        train, held_out = split_by_image(train, config.validation_fraction, config.seed)
        # The other modalities are not trained on, so there is nothing to validate.
        validation += choose_questions(held_out, config.train_modality)
    train = choose_questions(train, config.train_modality, config.train_count, config.seed)
    if config.images == "other":
        train = with_other_images(train)
    return Questions(
        train,
        _of_each_modality(validation, config.validation_count, config.seed),
        _of_each_modality(test, config.test_count, config.seed),
    )


def _read_all(files: Sequence[str], image_dir: str) -> list[Question]:
    questions = []
    for file in files:
        questions += read_questions(file, image_dir)
    return questions


def _of_each_modality(questions: list[Question], count: int, seed: int) -> list[Question]:
    chosen = []
    for modality in dict.fromkeys(question.modality for question in questions):
        chosen += choose_questions(questions, modality, count, seed)
    return chosen


def refuse_overlap(questions: Questions) -> None:
    """Raise an InputError if two of the three sets share an image."""
    # Images matter, not wording: a model may know the answer to a new question on a known image.
    first_use: dict[Path, str] = {}
    for use, sharing in zip(("trained", "validated", "tested"), questions, strict=True):
        for question in sharing:
            for image in question.images:
                if first_use.setdefault(image, use) != use:
                    raise InputError(
                        f"{question.source}: its image {image} is {first_use[image]} on too, so "
                        "the test would be worthless; leave one of the two out"
                    )


def prompt_encoder(vocabulary: Vocabulary, shape: Qwen2VLConfig, config: Config) -> PromptEncoder:
    """An encoder from questions to prompts for a model of this shape, with the config's limits."""
    return PromptEncoder(
        vocabulary.tokenizer,
        shape,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        max_prompt_tokens=config.max_prompt_tokens,
        too_long=config.too_long,
    )
