"""A run: its parts, its steps, and the work between and after them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.config import Config
from common.errors import InputError
from common.program import Stopped
from data import PromptEncoder, Question, Vocabulary, prompts_of_steps
from data.choice import Questions
from data.unseeing import LOADERS
from evaluation.accuracy import tally
from evaluation.answers import Examinee
from grpo.optimizer import MasterAdamW, scheduled_rate
from grpo.rollout import MicroBatch, Rollout, completion_logprobs, with_image_features
from model import Qwen2VL

from .checkpoint import Progress
from .incidents import write_incident
from .log import RunLog, SilentLog
from .parallel import ALONE, Ranks
from .saving import Checkpoints
from .step import Step
from .stop import StopRequest

Rest = TypeVarTuple("Rest")
Result = TypeVar("Result")


@dataclass
class Run:
    """The parts of a run. `reference` is None if the loss has no KL term."""

    config: Config
    questions: Questions
    policy: Qwen2VL
    reference: Qwen2VL | None
    vocabulary: Vocabulary
    encoder: PromptEncoder
    optimizer: MasterAdamW
    progress: Progress
    checkpoints: Checkpoints
    log: RunLog | SilentLog
    micro_batch_tokens: int  # the config's value, or less if the GPU ran out of memory
    stop: StopRequest = field(default_factory=StopRequest)
    saved_step: int = 0  # finished steps in the newest checkpoint
    ranks: Ranks = ALONE

    def steps(self) -> Iterator[Step]:
        """Yields the remaining steps; logs each after the loop body, and validates or saves if due.

        Raises:
            InputError: an image can't be read, a checkpoint can't be saved, or the loss or
                gradient was not finite in too many consecutive steps.
            Stopped: a signal stopped the run.
        """
        config = self.config
        numbers = range(self.progress.step, config.steps)
        prompts_of = prompts_of_steps(
            self.encoder,
            self.questions.train,
            numbers,
            config.questions_per_step,
            config.seed,
            self._leave_out if config.bad_images == "skip" else None,
            LOADERS[config.images],
            self.ranks.share,
        )
        if self._validate_if_due():  # the run was stopped before this validation
            self._save()
        bar = tqdm(
            total=config.steps,
            initial=self.progress.step,  # so that a resumed run shows its own speed
            desc=config.method.upper(),
            unit="step",
            dynamic_ncols=True,
        )
        # Closed however the loop ends, so that later output appears below the bar.
        with bar:
            for number in numbers:
                step = Step(number, (), config.device, ranks=self.ranks)
                with step.phase("prompts"):
                    prompts = next(prompts_of)
                    step.places, step.prompts = list(prompts), list(prompts.values())
                if config.freeze_vision:  # computed once per step, for all models and passes
                    with step.phase("vision"):
                        step.prompts = with_image_features(self.policy, step.prompts)
                if any(self.ranks.gather(len(step.prompts))):  # some of the images could be read
                    yield step
                bar.set_postfix(self.log.step(step), refresh=False)
                bar.update()
                self._end(step)

    def _leave_out(self, error: InputError) -> None:
        self.log.incident(self.progress.step, "image", f"question skipped: {error}")

    def micro_batches(self, rollout: Rollout) -> Iterator[MicroBatch]:
        """Yields whole groups, up to `micro_batch_tokens` at once; may stop the run in between."""
        missing = 0
        if self.config.shard and torch.is_grad_enabled():
            # All processes have to take part in the addition of each micro-batch's gradient.
            count = rollout.micro_batch_count(self.micro_batch_tokens)
            missing = max(self.ranks.gather(count)) - count
        for batch in rollout.micro_batches(self.micro_batch_tokens):
            self.stop.check()
            yield batch
        for _ in range(missing):
            self.optimizer.accumulate()

    def watch(self, tokens: Tensor) -> None:
        """Called after each token of a rollout or an answer; may stop the run."""
        self.stop.check()

    def apply_gradient(self, step: Step, stats: dict[str, Tensor]) -> bool:
        """Take an optimiser step on the accumulated gradient; adds statistics to `step.stats`.

        Returns False, and changes no weight, if the loss or gradient is not finite. From here on,
        the run may not stop until the step has been logged (`_end`).
        """
        if not self.config.shard:  # with it, they were added in `accumulate`
            self.ranks.add_gradients(self.optimizer.masters)
        self.stop.deferred = True
        rate = scheduled_rate(step.number, self.config)
        if torch.isfinite(stats["loss"]):
            stats = stats | self.optimizer.step(rate)
        else:
            self.optimizer.forget_gradients()
        step.stats |= stats
        step.stats["learning_rate"] = rate
        step.finite = "grad_norm" in stats and bool(torch.isfinite(stats["grad_norm"]))
        return step.finite

    def answers(self, questions: Sequence[Question], label: str) -> list[str]:
        """The current policy's greedy answers; `label` is for the progress bar."""
        examinee = Examinee(self.policy, self.vocabulary, self.encoder, self.config, self.watch)
        share = slice(self.ranks.rank, None, self.ranks.count)
        own = {}
        for place, (answer,) in examinee.answers(
            questions, label, range(len(questions)), share=share
        ):
            own[place] = answer.text
        texts = {place: text for part in self.ranks.gather(own) for place, text in part.items()}
        return [texts[place] for place in range(len(questions))]

    def _end(self, step: Step) -> None:
        """Count a logged step; validate and save if due; stop if requested."""
        config, progress, number = self.config, self.progress, step.number
        if step.finite:
            progress.bad_steps = 0
        else:
            progress.bad_steps += 1
            self._record_incident(step)
        if config.method == "grpo" and step.rollout and number % config.log_samples_every == 0:
            self.log.sample(step, step.rollout)
        progress.step = number + 1
        progress.seconds += sum(step.seconds.values())
        if step.rollout is not None:
            progress.tokens += int(step.rollout.mask_NGT.sum())
        self.stop.deferred = False
        validated = self._validate_if_due()
        if progress.bad_steps >= config.max_bad_steps:
            progress.bad_steps = 0  # a resumed run may fail as many times again
            with self.ranks.together():
                raise InputError(
                    f"{config.run_dir}: loss or gradient was not finite in {config.max_bad_steps} "
                    f"consecutive steps; `python -m training.incidents {config.run_dir}` shows "
                    "details; start again in another --run_dir with a lower learning_rate"
                )
        last = progress.step == config.steps
        if validated or last or progress.step % config.save_every == 0:
            self._save()
        self.stop.agree(self.ranks.gather)

    def _record_incident(self, step: Step) -> None:
        line = "loss or gradient is not finite: update skipped"
        assert step.rollout is not None  # a step without prompts has no loss
        step.rollout = self.ranks.with_images(step.rollout)
        if not self.ranks.leads:
            return
        folder = write_incident(self.config, step, self.policy)
        if folder:
            line += f"; details in {folder}"
        self.log.incident(step.number, "not finite", line)

    def _validate_if_due(self) -> bool:
        """Validate every `validate_every` steps and after the last, but only once after a step."""
        progress, config, done = self.progress, self.config, self.progress.step
        due = done > 0 and (done % config.validate_every == 0 or done == config.steps)
        if not self.questions.validation or not due or progress.validated == done:
            return False
        letters = [question.answer for question in self.questions.validation]
        accuracy = tally(letters, self.answers(self.questions.validation, "validation"))
        self.log.validation(done - 1, accuracy.right, accuracy.total)
        progress.validated = done
        if not progress.best or accuracy.right > progress.best["right"]:
            progress.best = {"step": done, "right": accuracy.right, "total": accuracy.total}
        return True

    def _save(self) -> None:
        self.checkpoints.save(self.policy, self.optimizer, self.progress)
        self.saved_step = self.progress.step

    def save_last_whole_step(self, error: BaseException) -> None:
        """Save the last finished step if that is still to do; `InputError`s are only printed."""
        self.optimizer.forget_gradients()
        works = [self.checkpoints.finish]
        # To gather shards takes all processes, and they have only agreed to stop, not to fail.
        alone = self.config.shard and self.ranks.count > 1 and not self.stop.agreed
        if not self.stop.deferred and not alone and self.progress.step > self.saved_step:
            works += [self._save, self.checkpoints.finish]
        for work in works:
            try:
                work()
            except InputError as other:
                if str(other) != str(error):
                    print(f"\n{other}", file=sys.stderr)


def smaller_if_memory_is_full(
    work: Callable[[Run, Rollout, *Rest], Result],
) -> Callable[[Run, Rollout, *Rest], Result]:
    """Make `work(run, rollout, ...)` retry with smaller micro-batches when GPU memory is full.

    The gradient stays the same, because the divisor of the loss does not depend on micro-batches.
    InputError if not even a single group fits. The results are sums over micro-batches; those of
    all processes are added.
    """

    @wraps(work)
    def fitted(run: Run, rollout: Rollout, *rest: *Rest) -> Result:
        while True:
            try:
                result = work(run, rollout, *rest)
                break
            except torch.OutOfMemoryError:
                if run.config.shard and run.ranks.count > 1:
                    raise  # the others would wait for its gradients
                pass  # retried outside of this block: the error keeps tensors alive
            run.optimizer.forget_gradients()
            torch.cuda.empty_cache()
            before = run.micro_batch_tokens
            run.micro_batch_tokens = rollout.smaller_micro_batches(before)
            line = f"out of memory with micro_batch_tokens = {before}"
            line += f"; continuing with {run.micro_batch_tokens}"
            run.log.incident(run.progress.step, "memory", line)
        return run.ranks.total(result, run.config.device)

    return fitted


@smaller_if_memory_is_full
@torch.no_grad()
def rollout_logprobs(run: Run, rollout: Rollout, model: Qwen2VL) -> Tensor:
    """log pi (N, G, T) of a whole rollout under `model`, without gradient; 0 outside the mask."""
    logp_NGT = torch.zeros_like(rollout.logp_NGT)
    for batch in run.micro_batches(rollout):
        allowed_V, temperature = run.vocabulary.allowed_V, run.config.temperature
        logp, _ = completion_logprobs(model, batch, allowed_V, temperature)
        batch.cut(logp_NGT).copy_(logp)
    return logp_NGT


@contextmanager
def saving_at_the_end(run: Run) -> Iterator[None]:
    """Listen to signals, and save the last finished step however training ends.

    An error or signal (bad files, a full disk, Ctrl-C) is raised again after saving.
    """
    with run.stop.listening():
        try:
            yield
            run.checkpoints.finish()
            run.stop.agree(run.ranks.gather)  # a signal may have come during the last save
        except (Exception, Stopped) as error:
            run.save_last_whole_step(error)
            if run.stop.agreed:
                run.ranks.gather(None)  # no process ends before the checkpoint is written
            if isinstance(error, OSError):  # it gives the cause, but not always the file
                error.filename = error.filename or run.config.run_dir
            if isinstance(error, Stopped):  # only now is the newest checkpoint known
                newest = run.checkpoints.newest()
                error.args = (f"stopped; the same command resumes from {newest}",)
            raise
