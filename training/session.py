"""What surrounds the steps of a run, whatever its method: prompts, records, validation,
checkpoints, every way to end.
"""

import math
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from common.config import Config
from common.errors import InputError
from data import Prompt, prompts_of_steps
from grpo.rollout import Rollout

from .incidents import room_for_incident, write_incident
from .log import RunLog, Stopwatch
from .run import Run
from .saving import Checkpoints
from .stop import Stopped

Validate = Callable[[], tuple[int, int]]
"""Asks the policy as it stands: how many validation questions it has right, of how many."""

_FAULTS = (InputError, OSError, MemoryError, torch.OutOfMemoryError, Stopped)


class Session:
    """The steps that a run has left: `for step, prompts, clock in session`, each closed by
    `session.end_step`.

    Used as a context manager. Whatever comes from outside (bad files, a full disk, a signal) leaves
    a checkpoint of the last whole step behind, if one can be written, before it goes on to the
    caller.
    """

    def __init__(self, run: Run, config: Config, validate: Validate | None) -> None:
        self.run, self.config, self.validate = run, config, validate
        self.checkpoints = Checkpoints(config)
        self._saved_step = run.progress["step"]

    def __enter__(self) -> Self:
        self.run.stop.__enter__()
        self.log = RunLog(
            self.config.run_dir, self.config.method, self.run.progress["step"], self.config.steps
        )
        self.run.tell = lambda kind, says: self.log.incident(self.run.progress["step"], kind, says)
        return self

    def __iter__(self) -> Iterator[tuple[int, list[Prompt], Stopwatch]]:
        run, config = self.run, self.config
        steps = range(run.progress["step"], config.steps)

        def left_out(error: InputError) -> None:
            run.tell("image", f"question left out: {error}")

        unreadable = left_out if config.bad_images == "skip" else None
        coming = prompts_of_steps(
            run.encoder,
            run.train_questions,
            steps,
            config.prompts_per_step,
            config.seed,
            unreadable,
        )
        if self._validate_if_due():  # a stop came before it
            self._save()
        for step in steps:
            clock = Stopwatch(config.device)
            try:
                prompts = next(coming)
            except InputError as error:
                raise InputError(
                    f"{error}; or go on without such images, by --bad_images skip"
                ) from None
            clock.lap("prompts")
            if prompts:
                yield step, prompts, clock
            else:
                self.log.record(step, {}, clock)
                self.end_step(step, clock)

    def end_step(
        self,
        step: int,
        clock: Stopwatch,
        rollout: Rollout | None = None,
        stats: dict[str, Tensor] | None = None,
        judged: dict[str, Tensor] | None = None,
    ) -> None:
        """Close a step: count it, write down one that was not finite, validate and save where that
        is due, or stop.

        Args:
            rollout, stats: of the step, "loss" and "grad_norm" among the statistics; None if
                nothing could be asked.
            judged: what else the loss took, for the record of a step that was not finite.

        Raises:
            InputError: too many steps in a row were not finite, or a checkpoint can't be saved.
            Stopped: the run was asked to stop.
        """
        run, config, progress = self.run, self.config, self.run.progress
        numbers = {name: float(x) for name, x in (stats or {}).items()}
        bad = not all(math.isfinite(numbers.get(name, 0.0)) for name in ("loss", "grad_norm"))
        if rollout is not None and bad:
            says = "loss or gradient is not finite, no update"
            if room_for_incident(config):
                folder = write_incident(config, step, run.policy, rollout, judged or {}, numbers)
                says += f"; all of it is in {folder}"
            self.log.incident(step, "not finite", says)
        progress["step"] = step + 1
        progress["seconds"] += clock.total
        progress["tokens"] += int(rollout.mask_NGT.sum()) if rollout is not None else 0
        progress["bad_steps"] = progress.get("bad_steps", 0) + 1 if bad else 0
        run.stop.deferred = False
        validated = self._validate_if_due()
        if progress["bad_steps"] >= config.max_bad_steps:
            progress["bad_steps"] = 0  # who goes on from here gets as many again
            raise InputError(
                f"{config.run_dir}: {config.max_bad_steps} steps in a row were not finite; `python -m training.incidents "
                f"{config.run_dir}` tells more; begin anew in another --run_dir, with a lower learning_rate"
            )
        if validated or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            self._save()
        run.stop.check()

    def _validate_if_due(self) -> bool:
        """Validate every `validate_every` steps and after the last; once for each, also if a stop
        came in between.
        """
        config, progress, done = self.config, self.run.progress, self.run.progress["step"]
        due = done > 0 and (done % config.validate_every == 0 or done == config.steps)
        if self.validate is None or not due or progress.get("validated") == done:
            return False
        right, total = self.validate()
        self.log.validation(done - 1, right, total)
        progress["validated"] = done
        best = progress.get("best")
        if best is None or right > best["right"]:
            progress["best"] = {"step": done, "right": right, "total": total}
        return True

    def _save(self) -> None:
        self.checkpoints.save(self.run.policy, self.run.optimizer, self.run.progress)
        self._saved_step = self.run.progress["step"]

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop = self.run.stop
        try:
            if kind is None:
                self.checkpoints.finish()
            elif isinstance(error, _FAULTS):
                self._save_last(error)
        finally:
            self.checkpoints.close()
            stop.__exit__()
            self._close_log(error)
        if isinstance(error, Stopped) or (error is None and stop.asked):
            number = error.signal if error else stop.asked
            raise Stopped(
                number, f"stopped; the same command goes on from {self.checkpoints.newest()}"
            ) from None

    def _close_log(self, error: BaseException | None) -> None:
        try:
            self.log.__exit__()
        except OSError as also:
            if error is None:  # else what could not be written before can't be now
                raise OSError(also.errno, also.strerror, self.config.run_dir) from None
        if isinstance(error, OSError):  # it says why, but not always where
            error.filename = error.filename or self.config.run_dir

    def _save_last(self, error: BaseException) -> None:
        """Save the last whole step, if weights and progress are those of a whole step; another
        fault is told besides.
        """
        self.run.optimizer.forget_gradients()
        unsaved = not self.run.stop.deferred and self.run.progress["step"] > self._saved_step
        for work in (
            self.checkpoints.finish,
            *((self._save, self.checkpoints.finish) if unsaved else ()),
        ):
            try:
                work()
            except InputError as also:
                if str(also) != str(error):
                    self.log.bar.write(str(also), file=sys.stderr)
