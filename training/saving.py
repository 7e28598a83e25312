"""Saving checkpoints while training goes on."""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from common.config import Config
from common.device import available_memory
from common.errors import InputError
from grpo.optimizer import MasterAdamW
from model import Qwen2VL, save_model
from model.saving import published_tensors, write_tensors

from .checkpoint import Progress, checkpoints, commit, progress_json


class Checkpoints:
    """Saves a run's checkpoints, in a thread of its own where memory allows a copy of them.

    Kept are the newest `config.keep_checkpoints`, and the best on validation. Leaving the context
    ends the thread, after what it is saving.
    """

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run_dir) / "checkpoints"
        self.kept = config.keep_checkpoints
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, model: Qwen2VL, optimizer: MasterAdamW, progress: Progress) -> Path:
        """Write `step-NNNNNN`.

        It may still be on its way when this returns: `finish` waits for it, and so does the next.

        Raises:
            InputError: this one, or the one before, can't be written.
        """
        self.finish()
        self._refuse_diverged(model)
        final = self.folder / f"step-{progress.step:06d}"
        text = progress_json(progress)  # as it is now
        best = progress.best.get("step", 0)
        state = optimizer.state()
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *state.values()))
        if available_memory() < 2 * size:  # the copy, and as much again for the run
            self._write(final, model, None, state, text, best)
        else:
            weights = published_tensors(model)
            copies = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            self._saving = self._pool.submit(self._write, final, model, weights, copies, text, best)
        return final

    def finish(self) -> None:
        """Wait until what is being saved is on the disk. InputError if it can't be."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def newest(self) -> str:
        """Where a run that ended now would go on from, in words."""
        saved = checkpoints(self.folder.parent)
        return str(saved[-1]) if saved else "the beginning"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def _refuse_diverged(self, model: Qwen2VL) -> None:
        finite = torch.stack([param.isfinite().all() for param in model.parameters()]).all()
        if not finite:
            raise InputError(
                f"{self.folder.parent}: the weights are not finite any more and are not saved: "
                "training has diverged; begin anew in another --run_dir with a lower learning_rate "
                f"(the last sound weights: {self.newest()})"
            )

    def _write(
        self,
        final: Path,
        model: Qwen2VL,
        weights: dict[str, Tensor] | None,
        state: dict[str, Tensor],
        progress: str,
        best: int,
    ) -> None:
        partial = final.with_suffix(".partial")
        try:
            for leftover in self.folder.glob("*.partial"):  # of a kill
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            save_model(model, partial, weights)
            write_tensors(state, partial / "optimizer.safetensors")
            (partial / "progress.json").write_text(progress, encoding="utf-8")
            commit(partial, final)
            self._delete_old(best)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"{final}: can't save the checkpoint ({error}); make room (*.damaged, older "
                "checkpoints and incidents/*/model may go) or mend the disk, and the same command "
                f"goes on from {self.newest()}"
            ) from None

    def _delete_old(self, best: int) -> None:
        for old in checkpoints(self.folder.parent)[: -self.kept]:
            if old.name != f"step-{best:06d}":
                # Renamed first: a kill while it is deleted leaves nothing that looks whole.
                going = old.with_suffix(".partial")
                os.replace(old, going)
                shutil.rmtree(going)
