"""Writing checkpoints while training goes on, so that each is whole on the disk before it has its
name.
"""

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import Config
from common.device import available_memory
from common.errors import InputError
from grpo.optimizer import MasterAdamW
from model import Qwen2VL, save_model
from model.weights import published_tensors, write_tensors

from .checkpoint import MANIFEST, checkpoints, sha256_of


class Checkpoints:
    """Saves a run's checkpoints, in a thread of its own wherever memory allows a copy of what is
    saved.

    Kept are the newest `config.keep_checkpoints`, and the best on validation
    (`progress["best"]["step"]`).
    """

    def __init__(self, config: Config) -> None:
        self.folder, self.kept = Path(config.run_dir) / "checkpoints", config.keep_checkpoints
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, model: Qwen2VL, optimizer: MasterAdamW, progress: dict[str, Any]) -> Path:
        """Write `step-NNNNNN`; `progress` holds the finished steps ("step") and all else to resume
        from.

        It may still be on its way when this returns: `finish` waits for it, and so does the next
            one.

        Raises:
            InputError: this one, or the one before, can't be written.
        """
        self.finish()
        if not bool(torch.stack([param.isfinite().all() for param in model.parameters()]).all()):
            raise InputError(
                f"{self.folder.parent}: the weights are not finite any more and are not saved: training has diverged; "
                f"begin anew in another --run_dir with a lower learning_rate (the last sound weights: {self.newest()})"
            )
        told = json.dumps(progress)  # as it is now
        final = self.folder / f"step-{progress['step']:06d}"
        best = progress.get("best", {}).get("step")
        state = optimizer.state()
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *state.values()))
        if available_memory() < 2 * size:  # the copy, and as much again for the run
            self._write(final, model, None, state, told, best)
        else:
            copies = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            self._saving = self._pool.submit(
                self._write, final, model, published_tensors(model), copies, told, best
            )
        return final

    def finish(self) -> None:
        """Wait until what is being saved is on the disk. InputError if it can't be."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """End the thread, after what it is saving."""
        self._pool.shutdown()

    def newest(self) -> str:
        """Where a run that ended now would go on from, in words."""
        return str(["the beginning", *checkpoints(self.folder.parent)][-1])

    def _write(
        self,
        final: Path,
        model: Qwen2VL,
        weights: dict[str, Tensor] | None,
        state: dict[str, Tensor],
        progress: str,
        best: int | None,
    ) -> None:
        partial = final.with_suffix(".partial")
        try:
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            save_model(model, partial, weights)
            write_tensors(state, partial / "optimizer.safetensors")
            (partial / "progress.json").write_text(progress, encoding="utf-8")
            commit(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"{final}: can't save the checkpoint ({error}); make room (*.damaged, older checkpoints and "
                f"incidents/*/model may go) or mend the disk, and the same command goes on from {self.newest()}"
            ) from None
        for old in checkpoints(self.folder.parent)[: -self.kept]:
            if old.name != f"step-{best or 0:06d}":
                going = old.with_suffix(
                    ".partial"
                )  # a kill while it is deleted leaves nothing that looks whole
                os.replace(old, going)
                shutil.rmtree(going)


def commit(partial: Path, final: Path) -> None:
    """Give a folder that is written its manifest and its name; before it has that name, all of it
    is on the disk.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in files
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*files, partial / MANIFEST, partial):
        _flush(path)
    if (
        final.exists()
    ):  # saved once more: out of the way first, so that the name never means a torn one
        os.replace(final, aside := final.with_suffix(".old.partial"))
        os.replace(partial, final)
        shutil.rmtree(aside)
    else:
        os.replace(partial, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
