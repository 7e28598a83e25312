"""What a config chooses of question files, and how its model reads them."""

from common.config import Config
from common.errors import InputError
from model import Qwen2VLConfig

from .encode import PromptEncoder
from .question import Question
from .readers import read_questions
from .subset import choose_questions, split_by_image
from .vocabulary import Vocabulary


def prompt_encoder(vocabulary: Vocabulary, shape: Qwen2VLConfig, config: Config) -> PromptEncoder:
    """The way from questions to prompts for a model of this shape, within the config's limits."""
    return PromptEncoder(
        vocabulary.tokenizer,
        image_token_id=shape.image_token_id,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        max_prompt_tokens=config.max_prompt_tokens,
        too_long=config.too_long,
        patch_size=shape.vision.patch_size,
        merge_size=shape.vision.spatial_merge_size,
        temporal_patch_size=shape.vision.temporal_patch_size,
    )


def load_questions(config: Config) -> tuple[list[Question], list[Question], list[Question]]:
    """Questions to train on, to validate on and to test on, as the config chooses them.

    Those of validation and test are ordered by modality; what is held out for validation is of
    `train_modality`.

    Raises:
        InputError: a file is wrong, or there are too few questions.
    """
    folder, modality = config.image_dir or None, config.train_modality or None
    trained = read_questions(
        config.train_questions, folder, check_images=config.bad_images == "error"
    )
    tested = [
        question for file in config.test_questions for question in read_questions(file, folder)
    ]
    validated = [
        question
        for file in config.validation_questions
        for question in read_questions(file, folder)
    ]
    if config.test_fraction:
        trained, held_out = split_by_image(trained, config.test_fraction, config.seed)
        tested += held_out
    if config.validation_fraction:
        trained, held_out = split_by_image(trained, config.validation_fraction, config.seed)
        validated += choose_questions(held_out, modality)
    try:
        chosen = choose_questions(trained, modality, config.train_count or None, config.seed)
    except InputError as error:
        held = len(validated) if config.validation_fraction else 0
        raise InputError(
            f"{error}{f' (validation_fraction holds {held} out)' if held else ''}"
        ) from None
    validated = _of_each_modality(validated, config.validation_count, config.seed)
    tested = _of_each_modality(tested, config.test_count, config.seed)
    return chosen, validated, tested


def _of_each_modality(questions: list[Question], count: int, seed: int) -> list[Question]:
    modalities = dict.fromkeys(question.modality for question in questions)
    return [
        one
        for modality in modalities
        for one in choose_questions(questions, modality, count or None, seed)
    ]


def refuse_overlap(
    trained: list[Question], validated: list[Question], tested: list[Question]
) -> None:
    """InputError if two of the three share an image."""
    for known, asked, use in (
        (trained, tested, "trained on"), (trained, validated, "trained on"), (validated, tested, "validated on"),
    ):  # fmt: skip
        images = {image for question in known for image in question.images}
        for question in asked:
            for image in images.intersection(question.images):
                raise InputError(
                    f"{question.source}: its image {image} is {use} too; such a test would be worth nothing, leave one out"
                )
