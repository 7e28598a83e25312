"""What a run consists of, made ready: questions, models, tokens, optimiser, and how far it has come."""

from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import torch

from data import (
    PromptEncoder,
    Question,
    Vocabulary,
    choose_questions,
    load_vocabulary,
    read_questions,
    split_by_image,
)
from model import InputError, Qwen2VL, Qwen2VLConfig, keep_freed_memory, load_model

from .checkpoint import claim_run_dir, find_checkpoint, load_checkpoint_model, load_progress
from .config import Config
from .optimizer import MasterAdamW


@dataclass(frozen=True, slots=True)
class Run:
    """`reference` is None where none is needed. `progress` holds "step" (finished ones), "seconds" and "tokens".

    `claim` keeps other processes out of the run's folder for as long as it lives.
    """

    train_questions: list[Question]
    test_questions: list[Question]
    policy: Qwen2VL
    reference: Qwen2VL | None
    vocabulary: Vocabulary
    encoder: PromptEncoder
    optimizer: MasterAdamW
    progress: dict[str, Any]
    claim: IO[str]


def prepare(config: Config) -> Run:
    """Begin or resume the run that `config` describes, and say on the terminal what it is. InputError for bad input."""
    keep_freed_memory()
    use_device(config)
    train_questions, test_questions = load_questions(config)
    refuse_overlap(train_questions, test_questions)
    checkpoint = find_checkpoint(config)
    load_base = partial(load_model, config.model, config.device, config.dtype)
    policy = load_checkpoint_model(config, checkpoint) if checkpoint else load_base()
    reference = load_base().requires_grad_(False) if config.beta and config.method == "grpo" else None
    policy.recompute = config.activation_checkpointing
    if config.freeze_vision:
        policy.visual.requires_grad_(False)
        if reference is not None:
            reference.visual = policy.visual  # one tower in memory
    vocabulary = load_vocabulary(config.model, policy.config, config.device)
    encoder = prompt_encoder(vocabulary, policy.config, config)
    train_questions, skipped = encoder.select(train_questions)
    test_questions, skipped_tests = encoder.select(test_questions)
    optimizer = MasterAdamW(policy, config)
    progress = load_progress(checkpoint, optimizer) if checkpoint else {"step": 0, "seconds": 0.0, "tokens": 0}
    if len(progress.get("answers_before", test_questions)) != len(test_questions):
        raise InputError(
            f"{config.run_dir}: begun with other test questions; restore the files or choose another --run_dir"
        )
    claim = claim_run_dir(config)

    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    print(f"Qwen2-VL of {millions:.1f} M parameters from {config.model}, {config.dtype} on {config.device}")
    print(f"{len(train_questions)} questions to train on, {len(test_questions)} to test")
    if skipped or skipped_tests:
        limit = f"left out as longer than {config.max_prompt_tokens} tokens"
        print(f"{limit}: {skipped} of training, {skipped_tests} of test")
    if checkpoint:
        print(f"going on from {checkpoint}")
    return Run(train_questions, test_questions, policy, reference, vocabulary, encoder, optimizer, progress, claim)


def use_device(config: Config) -> None:
    """Make the config's device the current one. InputError if it is a GPU that is not there."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device is {config.device!r}, but torch finds no CUDA GPU; give --device cpu")
    if ":" in config.device:  # graphs are captured, and waited for, on the current device
        if int(config.device.split(":")[1]) >= torch.cuda.device_count():
            raise InputError(f"device is {config.device!r}, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(config.device)


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


def load_questions(config: Config) -> tuple[list[Question], list[Question]]:
    """Training questions, and test questions of all test files by modality, as the config chooses them."""
    folder = config.image_dir or None
    train_questions = read_questions(config.train_questions, folder)
    tested = [question for file in config.test_questions for question in read_questions(file, folder)]
    if config.test_fraction:
        train_questions, held_out = split_by_image(train_questions, config.test_fraction, config.seed)
        tested += held_out
    chosen = choose_questions(train_questions, config.train_modality or None, config.train_count or None, config.seed)
    modalities = dict.fromkeys(question.modality for question in tested)
    parts = [choose_questions(tested, modality, config.test_count or None, config.seed) for modality in modalities]
    return chosen, [question for part in parts for question in part]


def refuse_overlap(train_questions: list[Question], test_questions: list[Question]) -> None:
    """InputError if an image is both trained on and tested."""
    trained_on = {image for question in train_questions for image in question.images}
    for question in test_questions:
        for image in trained_on.intersection(question.images):
            raise InputError(
                f"{question.source}: its image {image} is trained on too; such a test would be worth nothing"
            )
