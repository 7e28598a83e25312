"""A run made ready: questions, models, tokens, optimiser, and how far it has come."""

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common.config import Config
from common.device import use_device
from common.hub import model_folder
from data import PromptEncoder, load_vocabulary
from data.choice import Questions, load_questions, prompt_encoder, refuse_overlap
from data.pixel_limits import with_pixel_limits
from grpo.optimizer import MasterAdamW
from model import Qwen2VL, keep_freed_memory, load_model

from .checkpoint import Progress, load_progress
from .folder import (
    claimed,
    find_checkpoint,
    questions_digest,
    refuse_other_contents,
    weights_digest,
    write_config,
)
from .log import RunLog
from .run import Run
from .saving import Checkpoints


@contextmanager
def prepared(config: Config) -> Iterator[Run]:
    """Begin or resume the run that `config` describes, and say on the terminal what it is.

    Its folder is this process's own until the context is left. InputError for bad input.
    """
    keep_freed_memory()
    use_device(config)
    questions = load_questions(config)
    refuse_overlap(questions)
    with claimed(config):
        checkpoint = find_checkpoint(config)
        folder = model_folder(config.model)
        policy, reference = _models(config, folder, checkpoint)
        vocabulary = load_vocabulary(folder, policy.config, config.device)
        encoder = prompt_encoder(vocabulary, policy.config, config)
        questions = _fitting(encoder, config, questions)

        optimizer = MasterAdamW(policy, config)
        progress = load_progress(checkpoint, optimizer) if checkpoint else Progress()
        contents = {
            "base weights": weights_digest(folder),
            "training questions": questions_digest(questions.train),
            "validation questions": questions_digest(questions.validation),
            "test questions": questions_digest(questions.test),
        }
        refuse_other_contents(config, progress.contents or contents, contents)
        progress.contents = contents
        write_config(config)
        _warn_of_a_full_disk(config, policy, optimizer)
        if checkpoint:
            print(f"going on from {checkpoint}")
        with ThreadPoolExecutor(1, "checkpoint") as saver, RunLog(config, progress.step) as log:
            yield Run(
                config=config,
                questions=questions,
                policy=policy,
                reference=reference,
                vocabulary=vocabulary,
                encoder=encoder,
                optimizer=optimizer,
                progress=progress,
                checkpoints=Checkpoints(config, saver),
                log=log,
                micro_batch_tokens=config.micro_batch_tokens,
                saved_step=progress.step,
            )


def _models(
    config: Config, folder: Path, checkpoint: Path | None
) -> tuple[Qwen2VL, Qwen2VL | None]:
    """The policy, as the checkpoint has it or the base, and the frozen reference, or None."""
    policy = load_model(checkpoint or folder, config.device, config.dtype)
    # Tokenizer files come from the base in any case; the limits of an image are the run's.
    policy.companions = with_pixel_limits(folder, config.min_pixels, config.max_pixels)
    policy.recompute = config.activation_checkpointing
    reference = None
    if config.beta and config.method == "grpo":
        reference = load_model(folder, config.device, config.dtype).requires_grad_(False)
    if config.freeze_vision:
        policy.visual.requires_grad_(False)
        if reference is not None:
            reference.visual = policy.visual  # one tower in memory
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    place = f"{config.dtype} on {config.device}"
    print(f"Qwen2-VL of {millions:.1f} M parameters from {config.model}, {place}")
    return policy, reference


def _fitting(encoder: PromptEncoder, config: Config, questions: Questions) -> Questions:
    """Of the questions those whose prompts fit; says how many, and what is left out."""
    train, skipped, unreadable = encoder.select(
        questions.train, keep_unreadable=config.bad_images == "skip"
    )
    validation, skipped_validation, _ = encoder.select(questions.validation)
    test, skipped_tests, _ = encoder.select(questions.test)
    validating = f"{len(validation)} to validate on, " if validation else ""
    print(f"{len(train)} questions to train on, {validating}{len(test)} to test")
    if skipped or skipped_validation or skipped_tests:
        counts = (
            f"{skipped} of training, {skipped_validation} of validation, {skipped_tests} of test"
        )
        print(f"left out as longer than {config.max_prompt_tokens} tokens: {counts}")
    if unreadable:
        count = f"{len(unreadable)}, first {unreadable[0]}"
        print(f"left out when their turn comes, as their images can't be read: {count}")
    return Questions(train, validation, test)


def _warn_of_a_full_disk(config: Config, policy: Qwen2VL, optimizer: MasterAdamW) -> None:
    """Before the night and not in it: checkpoints that are kept, the best, one being written."""
    masters = sum(4 * param.numel() for param in optimizer.params)
    weights = sum(param.nbytes for param in policy.parameters())
    separate = any(m is not p for m, p in zip(optimizer.masters, optimizer.params, strict=True))
    copies = 2 + separate  # both moments, and masters if they are not the weights
    best = bool(config.validation_questions or config.validation_fraction)
    needed = (weights + copies * masters) * (config.keep_checkpoints + 1 + best)
    run_dir = Path(config.run_dir)
    held = sum(file.stat().st_size for file in run_dir.glob("checkpoints/step-*/*"))
    free = shutil.disk_usage(run_dir).free + held
    if needed > free:
        line = f"checkpoints may take {needed / 1e9:.1f} GB here, but only {free / 1e9:.1f} GB are"
        remedy = "lower keep_checkpoints or make room"
        print(f"! {line} free for them in {run_dir}: {remedy}", file=sys.stderr)
