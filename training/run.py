"""What a run consists of, made ready: questions, models, tokens, optimiser, and how far it has
come.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from common.config import Config
from common.device import use_device
from common.errors import InputError
from common.hub import model_folder
from data import (
    PromptEncoder,
    Question,
    Vocabulary,
    load_vocabulary,
)
from data.choice import load_questions, prompt_encoder, refuse_overlap
from grpo.optimizer import MasterAdamW
from grpo.rollout import MicroBatch, Rollout
from model import Qwen2VL, keep_freed_memory, load_model

from .checkpoint import (
    claim_run_dir,
    find_checkpoint,
    load_checkpoint_model,
    load_progress,
    questions_digest,
    same_contents,
    weights_digest,
    write_config,
)
from .stop import StopRequest

T = TypeVar("T")


@dataclass(slots=True)
class Run:
    """`reference` is None where none is needed. `progress` holds "step" (finished ones), "seconds",
    "tokens" and what else a resumed run must know.

    `claim` keeps other processes out of the run's folder until it is closed. `stop` says whether
    the run is asked to end, and `micro_batch_tokens` may become smaller than the config's where a
    GPU's memory does not suffice. `tell` takes down an incident, its kind and what it says.
    """

    train_questions: list[Question]
    validation_questions: list[Question]
    test_questions: list[Question]
    policy: Qwen2VL
    reference: Qwen2VL | None
    vocabulary: Vocabulary
    encoder: PromptEncoder
    optimizer: MasterAdamW
    progress: dict[str, Any]
    claim: IO[str]
    stop: StopRequest
    micro_batch_tokens: int
    tell: Callable[[str, str], None]

    def micro_batches(self, rollout: Rollout) -> Iterator[MicroBatch]:
        """As `Rollout.micro_batches`; between two of them a request to stop is obeyed."""
        for part in rollout.micro_batches(self.micro_batch_tokens):
            self.stop.check()
            yield part

    def fitted(self, rollout: Rollout, work: Callable[[], T]) -> T:
        """`work()`, which goes through the micro-batches of the rollout; done anew with smaller
        ones if a GPU's memory does not suffice. That changes no gradient: the divisor of the loss
        does not depend on them.

        Raises:
            InputError: not even one group fits.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                pass  # left before going on: the error holds on to the tensors of what failed
            self.optimizer.forget_gradients()
            torch.cuda.empty_cache()
            before = self.micro_batch_tokens
            self.micro_batch_tokens = rollout.smaller_micro_batches(before)
            self.tell(
                "memory",
                f"out of memory with micro_batch_tokens = {before}; going on with {self.micro_batch_tokens}",
            )

    def update(self, rate: float, loss: Tensor) -> dict[str, Tensor]:
        """The optimiser's step on the gradients so far; left out, with a norm that says so, if the
        loss is not finite.

        From here on the step must come to its end before the run may stop.
        """
        self.stop.deferred = True
        if not torch.isfinite(loss):
            self.optimizer.forget_gradients()
            return {"grad_norm": loss.detach()}
        return self.optimizer.step(rate)


def prepare(config: Config) -> Run:
    """Begin or resume the run that `config` describes, and say on the terminal what it is.
    InputError for bad input.
    """
    keep_freed_memory()
    use_device(config)
    questions = load_questions(config)
    refuse_overlap(*questions)
    claim = claim_run_dir(config)
    checkpoint = find_checkpoint(config)
    folder = model_folder(config.model)
    load_base = partial(load_model, folder, config.device, config.dtype)
    policy = load_checkpoint_model(config, checkpoint, folder) if checkpoint else load_base()
    reference = (
        load_base().requires_grad_(False) if config.beta and config.method == "grpo" else None
    )
    policy.recompute = config.activation_checkpointing
    if config.freeze_vision:
        policy.visual.requires_grad_(False)
        if reference is not None:
            reference.visual = policy.visual  # one tower in memory
    vocabulary = load_vocabulary(folder, policy.config, config.device)
    encoder = prompt_encoder(vocabulary, policy.config, config)
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    print(
        f"Qwen2-VL of {millions:.1f} M parameters from {config.model}, {config.dtype} on {config.device}"
    )
    train, validation, test = _fitting(encoder, config, *questions)
    optimizer = MasterAdamW(policy, config)
    progress = (
        load_progress(checkpoint, optimizer)
        if checkpoint
        else {"step": 0, "seconds": 0.0, "tokens": 0}
    )
    names = "training questions", "validation questions", "test questions"
    digests = dict(zip(names, map(questions_digest, (train, validation, test))))
    same_contents(config, progress, {"base weights": weights_digest(folder), **digests})
    write_config(config)
    _warn_of_a_full_disk(config, policy, optimizer)
    if checkpoint:
        print(f"going on from {checkpoint}")
    return Run(
        train, validation, test, policy, reference, vocabulary, encoder, optimizer, progress, claim, StopRequest(),
        config.micro_batch_tokens, lambda kind, says: print(says, file=sys.stderr),
    )  # fmt: skip


def _fitting(
    encoder: PromptEncoder,
    config: Config,
    train: list[Question],
    validation: list[Question],
    test: list[Question],
) -> tuple[list[Question], list[Question], list[Question]]:
    """Of the questions those whose prompts fit; says how many, and what is left out."""
    unreadable: list[InputError] = []
    train, skipped = encoder.select(
        train, unreadable.append if config.bad_images == "skip" else None
    )
    validation, skipped_validation = encoder.select(validation)
    test, skipped_tests = encoder.select(test)
    validating = f"{len(validation)} to validate on, " if validation else ""
    print(f"{len(train)} questions to train on, {validating}{len(test)} to test")
    if skipped or skipped_validation or skipped_tests:
        limit = f"left out as longer than {config.max_prompt_tokens} tokens"
        print(
            f"{limit}: {skipped} of training, {skipped_validation} of validation, {skipped_tests} of test"
        )
    if unreadable:
        print(
            f"left out when their turn comes, as their images can't be read: {len(unreadable)}, first {unreadable[0]}"
        )
    return train, validation, test


def _warn_of_a_full_disk(config: Config, policy: Qwen2VL, optimizer: MasterAdamW) -> None:
    """Before the night and not in the middle of it: checkpoints that are kept, the best, one being
    written.
    """
    masters = sum(4 * param.numel() for param in optimizer.params)
    weights = sum(param.nbytes for param in policy.parameters())
    each = weights + (2 if config.dtype == "float32" else 3) * masters
    needed = each * (
        config.keep_checkpoints
        + 1
        + bool(config.validation_questions or config.validation_fraction)
    )
    there = sum(
        file.stat().st_size for file in Path(config.run_dir).glob("checkpoints/step-??????/*")
    )
    free = shutil.disk_usage(config.run_dir).free + there
    if needed > free:
        print(f"! checkpoints may take {needed / 1e9:.1f} GB here, but only {free / 1e9:.1f} GB are free for them in "
              f"{config.run_dir}: lower keep_checkpoints or make room", file=sys.stderr)  # fmt: skip
