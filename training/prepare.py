"""Setting up a run: loads questions, models and optimiser, and the checkpoint to resume from."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common.config import Config, config_toml
from common.device import use_device
from common.errors import InputError
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
from .log import RunLog, SilentLog
from .parallel import ALONE, Ranks, Shards, of_this_rank
from .run import Run
from .saving import Checkpoints, warn_of_a_small_disk
from .stop import StopRequest


@contextmanager
def prepared(config: Config, ranks: Ranks = ALONE) -> Iterator[Run]:
    """Start or resume the run that `config` describes, and print a summary.

    The run folder stays locked until the context is left. InputError for bad input.
    """
    keep_freed_memory()
    given = config
    with ExitStack() as held:
        checkpoint = None
        with ranks.together():
            config = of_this_rank(given, ranks)
            use_device(config)
            questions = load_questions(config)
            refuse_overlap(questions)
            if ranks.leads:
                held.enter_context(claimed(config))
                checkpoint = find_checkpoint(config)
        checkpoint = ranks.gather(checkpoint)[0]
        with ranks.together():
            saver = held.enter_context(ThreadPoolExecutor(1, "checkpoint"))
            run = _loaded(config, ranks, questions, checkpoint, saver)
        ranks.refuse_differences(run.progress.contents | {"config": config_toml(given)})
        if ranks.leads:
            write_config(given)
            weights = sum(param.nbytes for param in run.policy.parameters())
            warn_of_a_small_disk(config, weights + run.optimizer.state_bytes(), weights)
            run.log = held.enter_context(RunLog(config, run.progress.step))
        if checkpoint:
            print(f"resuming from {checkpoint}")
        yield run


def _loaded(
    config: Config,
    ranks: Ranks,
    questions: Questions,
    checkpoint: Path | None,
    saver: ThreadPoolExecutor,
) -> Run:
    """The parts of the run, loaded; its log is silent."""
    folder = model_folder(config.model)
    policy, reference = _models(config, folder, checkpoint)
    vocabulary = load_vocabulary(folder, policy.config, config.device)
    encoder = prompt_encoder(vocabulary, policy.config, config)
    questions, too_long, unreadable = fitting_questions(encoder, config, questions)
    _print_counts(questions, too_long, unreadable)
    spread = Shards(ranks, config.device) if config.shard and ranks.count > 1 else None
    optimizer = MasterAdamW(policy, config, spread)
    progress = load_progress(checkpoint, optimizer) if checkpoint else Progress()
    contents = {"base weights": weights_digest(folder)}
    for name, chosen in zip(("training", "validation", "test"), questions, strict=True):
        contents[f"{name} questions"] = questions_digest(chosen)
    refuse_other_contents(config, progress.contents or contents, contents)
    progress.contents = contents
    return Run(
        config=config,
        questions=questions,
        policy=policy,
        reference=reference,
        vocabulary=vocabulary,
        encoder=encoder,
        optimizer=optimizer,
        progress=progress,
        checkpoints=Checkpoints(config, saver, writes=ranks.leads),
        log=SilentLog(),
        micro_batch_tokens=config.micro_batch_tokens,
        stop=StopRequest(alone=ranks.count == 1),
        saved_step=progress.step,
        ranks=ranks,
    )


def _models(
    config: Config, folder: Path, checkpoint: Path | None
) -> tuple[Qwen2VL, Qwen2VL | None]:
    """The policy, from the checkpoint or else the base, and the frozen reference, or None."""
    policy = load_model(checkpoint or folder, config.device, config.dtype)
    # Tokenizer files always come from the base; the pixel limits are those of the config.
    policy.companions = with_pixel_limits(folder, config.min_pixels, config.max_pixels)
    policy.recompute = config.activation_checkpointing
    reference = None
    if config.beta and config.method == "grpo":
        reference = load_model(folder, config.device, config.dtype).requires_grad_(False)
    if config.freeze_vision:
        policy.visual.requires_grad_(False)
        if reference is not None:
            reference.visual = policy.visual  # one vision tower in memory
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    place = f"{config.dtype} on {config.device}"
    print(f"Qwen2-VL of {millions:.1f} M parameters from {config.model}, {place}")
    return policy, reference


def _print_counts(questions: Questions, too_long: list[int], unreadable: list[InputError]) -> None:
    counts = "{} for training, {} for validation, {} for testing"
    print(f"questions: {counts.format(*map(len, questions))}")
    if any(too_long):
        print(f"skipped, longer than max_prompt_tokens: {counts.format(*too_long)}")
    if unreadable:
        count = f"{len(unreadable)}, first {unreadable[0]}"
        print(f"will be skipped because their images can't be read: {count}")


def fitting_questions(
    encoder: PromptEncoder, config: Config, questions: Questions
) -> tuple[Questions, list[int], list[InputError]]:
    """Returns the questions whose prompts fit within `max_prompt_tokens`.

    Also returns the number of prompts that are too long in each of the three sets, and the errors
    of training images that can't be read and will be skipped.
    """
    train = encoder.select(questions.train, keep_unreadable=config.bad_images == "skip")
    # Runs are compared on these two sets, so all their images must be readable.
    validation, test = encoder.select(questions.validation), encoder.select(questions.test)
    fitting = Questions(train.questions, validation.questions, test.questions)
    return fitting, [train.too_long, validation.too_long, test.too_long], train.unreadable
