"""What a config chooses of question files, and how its model reads them."""

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
    """Questions to train on, to validate on and to test on."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]


def load_questions(config: Config) -> Questions:
    """The questions of a run, as the config chooses them.

    Those of validation and test are ordered by modality; what is held out for validation is of
    `train_modality`.

    Raises:
        InputError: a file is wrong, or there are too few questions.
    """
    # Only in training may a missing image be skipped: by the other sets runs are compared.
    train = read_questions(config.train_questions, config.image_dir, config.bad_images == "error")
    validation = _read_all(config.validation_questions, config.image_dir)
    test = _read_all(config.test_questions, config.image_dir)
    # The test set first: whether a run validates does not change what it is tested on.
    if config.test_fraction:
        train, held_out = split_by_image(train, config.test_fraction, config.seed)
        test += held_out
    if config.validation_fraction:
        train, held_out = split_by_image(train, config.validation_fraction, config.seed)
        # Of other modalities nothing is trained on, so that there is nothing to validate.
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
    """InputError if two of the three share an image."""
    # By images, not by words: to another question on a known image the answer may be known.
    first_use: dict[Path, str] = {}
    for use, sharing in zip(("trained", "validated", "tested"), questions, strict=True):
        for question in sharing:
            for image in question.images:
                if first_use.setdefault(image, use) != use:
                    raise InputError(
                        f"{question.source}: its image {image} is {first_use[image]} on too; such "
                        "a test would be worth nothing, leave one out"
                    )


def prompt_encoder(vocabulary: Vocabulary, shape: Qwen2VLConfig, config: Config) -> PromptEncoder:
    """The way from questions to prompts for a model of this shape, within the config's limits."""
    return PromptEncoder(
        vocabulary.tokenizer,
        shape,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        max_prompt_tokens=config.max_prompt_tokens,
        too_long=config.too_long,
    )
