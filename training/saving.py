"""Saving checkpoints in the background."""

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from common.config import Config
from common.device import available_memory
from common.errors import InputError
from grpo.optimizer import MasterAdamW
from model import Qwen2VL, save_model
from model.saving import published_tensors, write_tensors

from .checkpoint import Progress, checkpoints, written_whole


class Checkpoints:
    """Saves the checkpoints of a run, in the background if there is enough memory for a copy.

    Keeps the newest `config.keep_checkpoints` and the best on validation. `thread` must have a
    single worker. Of several processes all have to call `save`, and one `writes`.
    """

    def __init__(self, config: Config, thread: ThreadPoolExecutor, writes: bool = True) -> None:
        self.folder = Path(config.run_dir) / "checkpoints"
        self.kept = config.keep_checkpoints
        self.writes = writes
        self._thread = thread
        self._saving: Future[None] | None = None

    def save(self, model: Qwen2VL, optimizer: MasterAdamW, progress: Progress) -> Path:
        """Save a checkpoint `step-NNNNNN`, and return its path.

        Writing may continue in the background; `finish` and the next `save` wait for it.

        Raises:
            InputError: this checkpoint or the previous one can't be written, or the weights are
                not finite.
        """
        self.finish()
        self._refuse_diverged(model)
        final = self.folder / f"step-{progress.step:06d}"
        weights = None
        size = sum(param.nbytes for param in model.parameters()) + optimizer.state_bytes()
        room = available_memory() >= 2 * size  # the copy, and as much again for the run
        state = {}
        for name, tensor in optimizer.state():
            if self.writes:
                copied = room or optimizer.spread.gathers
                state[name] = tensor.to("cpu", copy=True) if copied else tensor
        if not self.writes:
            return final
        if room:
            weights = published_tensors(model)
        now = replace(progress)  # also a copy, because the run updates its own
        self._saving = self._thread.submit(self._write, final, model, weights, state, now)
        if not room:
            self.finish()
        return final

    def finish(self) -> None:
        """Wait until the checkpoint being saved is on disk. InputError if it can't be written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def newest(self) -> str:
        """The path of the newest checkpoint, for messages; "the beginning" before the first."""
        saved = checkpoints(self.folder.parent)
        return str(saved[-1]) if saved else "the beginning"

    def _refuse_diverged(self, model: Qwen2VL) -> None:
        finite = torch.stack([param.isfinite().all() for param in model.parameters()]).all()
        if not finite:
            raise InputError(
                f"{self.folder.parent}: the weights are no longer finite and were not saved: "
                "training has diverged; start again in another --run_dir with a lower "
                f"learning_rate (last finite weights: {self.newest()})"
            )

    def _write(
        self,
        final: Path,
        model: Qwen2VL,
        weights: dict[str, Tensor] | None,
        state: dict[str, Tensor],
        progress: Progress,
    ) -> None:
        try:
            for leftover in self.folder.glob("*.partial"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
            with written_whole(final) as folder:
                save_model(model, folder, weights)
                write_tensors(state, folder / "optimizer.safetensors")
                text = json.dumps(asdict(progress))
                (folder / "progress.json").write_text(text, encoding="utf-8")
            self._delete_old(progress.best.get("step", 0))
        except OSError as error:
            raise InputError(
                f"{final}: can't save the checkpoint ({error}); free some space (*.damaged, older "
                "checkpoints and incidents/*/model may be deleted) or repair the disk; the same "
                f"command then resumes from {self.newest()}"
            ) from None

    def _delete_old(self, best: int) -> None:
        for old in checkpoints(self.folder.parent)[: -self.kept]:
            if old.name != f"step-{best:06d}":
                # Renamed first, so that a kill during deletion leaves nothing that looks whole.
                renamed = old.with_suffix(".partial")
                os.replace(old, renamed)
                shutil.rmtree(renamed)


def checkpoints_at_once(config: Config) -> int:
    """The largest number of checkpoints of a run that are on disk at any time."""
    best = bool(config.validation_questions or config.validation_fraction)
    # + 1: a new checkpoint is written before an old one is deleted.
    return config.keep_checkpoints + 1 + best


def warn_of_a_small_disk(config: Config, checkpoint: int, model: int) -> None:
    """Print a warning if the disk is too small for the run.

    `checkpoint` and `model` are the sizes of one checkpoint and of the trained model, in bytes.
    """
    needed = checkpoints_at_once(config) * checkpoint + model
    run_dir = Path(config.run_dir).absolute()
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    # A resumed run replaces its old checkpoints by new ones.
    held = sum(file.stat().st_size for file in run_dir.glob("checkpoints/step-*/*"))
    free = shutil.disk_usage(folder).free + held
    if needed > free:
        line = f"checkpoints and model may need {needed / 1e9:.1f} GB in {folder}"
        remedy = "lower keep_checkpoints or free some space"
        print(f"! {line}, but only {free / 1e9:.1f} GB is available: {remedy}")
