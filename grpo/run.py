"""What a run consists of, made ready: questions, models, tokens, optimiser, and how far it has come."""

from dataclasses import dataclass
from typing import Any

from data import PromptEncoder, Question, choose_questions, read_questions
from data.vocabulary import Vocabulary, load_vocabulary
from model import Qwen2VL, load_model

from .checkpoint import load_checkpoint_model, load_progress, open_run
from .config import Config
from .optimizer import MasterAdamW


@dataclass(frozen=True, slots=True)
class Run:
    """`reference` is None where beta is 0. `progress` holds "step" (finished ones), "seconds", "tokens", and grows."""

    train_questions: list[Question]
    test_questions: list[Question]
    policy: Qwen2VL
    reference: Qwen2VL | None
    vocabulary: Vocabulary
    encoder: PromptEncoder
    optimizer: MasterAdamW
    progress: dict[str, Any]


def prepare(config: Config) -> Run:
    """Begin or resume the run that `config` describes, and say on the terminal what it is. InputError for bad input."""
    checkpoint = open_run(config)
    train_questions, test_questions = load_questions(config)
    base = load_model(config.model, config.device, config.dtype)
    policy = load_checkpoint_model(config, checkpoint) if checkpoint else base
    reference = None
    if config.beta:
        reference = base if checkpoint else load_model(config.model, config.device, config.dtype)
        reference.requires_grad_(False)
    vocabulary = load_vocabulary(config.model, policy.config, config.device)
    encoder = PromptEncoder(
        vocabulary.tokenizer,
        image_token_id=policy.config.image_token_id,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        max_prompt_tokens=config.max_prompt_tokens,
        too_long=config.too_long,
        patch_size=policy.config.vision.patch_size,
        merge_size=policy.config.vision.spatial_merge_size,
        temporal_patch_size=policy.config.vision.temporal_patch_size,
    )
    train_questions, skipped = encoder.select(train_questions)
    test_questions, skipped_tests = encoder.select(test_questions)
    optimizer = MasterAdamW(
        policy,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    progress = load_progress(checkpoint, optimizer) if checkpoint else {"step": 0, "seconds": 0.0, "tokens": 0}

    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    print(f"Qwen2-VL of {millions:.1f} M parameters from {config.model}, {config.dtype} on {config.device}")
    print(f"{len(train_questions)} questions to train on, {len(test_questions)} to test")
    if skipped or skipped_tests:
        print(f"left out as longer than {config.max_prompt_tokens} tokens: {skipped} of training, {skipped_tests} of test")
    if checkpoint:
        print(f"going on from {checkpoint}")
    return Run(train_questions, test_questions, policy, reference, vocabulary, encoder, optimizer, progress)


def load_questions(config: Config) -> tuple[list[Question], list[Question]]:
    """Training questions, and test questions of all test files by modality, as the config chooses them."""
    folder = config.image_dir or None
    train_questions = read_questions(config.train_questions, folder)
    chosen = choose_questions(train_questions, config.train_modality or None, config.train_count or None, config.seed)
    tested = [question for file in config.test_questions for question in read_questions(file, folder)]
    modalities = dict.fromkeys(question.modality for question in tested)
    parts = [choose_questions(tested, modality, config.test_count or None, config.seed) for modality in modalities]
    return chosen, [question for part in parts for question in part]
