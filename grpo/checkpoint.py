"""A run on disk: the resolved config, and checkpoints to resume from.

A checkpoint is a folder `checkpoints/step-000100/` with the model in Hugging Face layout, the optimiser's tensors and
a small JSON: safetensors and text only, and a manifest of every file's size and SHA-256. It is written beside its place,
flushed to the disk and renamed, so that a half-written one never counts; one whose files are not those of its manifest
is passed over, loudly, for the one before it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import InputError, Qwen2VL, load_model, save_model
from model.weights import published_tensors, write_tensors

from .config import Config, config_toml
from .optimizer import MasterAdamW

MAY_DIFFER = {
    "device",
    "micro_batch_tokens",
    "micro_batch_prompts",  # of older runs
    "activation_checkpointing",
    "offload_optimizer",
    "keep_checkpoints",
    "bad_images",
    "max_bad_steps",
    "validate_every",
    "eval_batch_prompts",
    "save_every",
    "log_samples_every",
}
"""Fields that a resumed run may change, because they change nothing but speed, memory and what is written down."""

MANIFEST = "manifest.json"


def find_checkpoint(config: Config) -> Path | None:
    """`resumable`'s checkpoint. Newer ones that are damaged are moved aside; apart from that, it writes nothing."""
    checkpoint, damages = resumable(config)
    for damaged, damage in damages.items():
        aside = damaged.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(damaged, aside)
        print(f"{damaged} is damaged ({damage}): moved to {aside.name}, passed over", file=sys.stderr)
    return checkpoint


def resumable(config: Config) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that this config may resume from, or None for a fresh start; newer ones and their damage.

    InputError if the folder holds checkpoints of a config that differs in more than `MAY_DIFFER` (mixing two runs would
    make both worthless), or none that is whole. A run without checkpoint or result is begun anew.
    """
    folder = Path(config.run_dir)
    saved = checkpoints(folder)
    if not saved and (folder / "model").exists():
        raise InputError(f"{folder} holds a finished run; choose another --run_dir or delete it")
    if not saved:
        return None, {}
    try:
        theirs = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder}: its config.toml can't be read ({error}); choose another --run_dir") from None
    ours = tomllib.loads(config_toml(config))
    theirs = {field.name: field.default for field in fields(Config)} | theirs  # fields that came later
    keys = sorted(key for key in (ours.keys() | theirs.keys()) - MAY_DIFFER if ours.get(key) != theirs.get(key))
    if keys:
        values = ", ".join(f"{key} ({theirs.get(key)} there, {ours.get(key)} here)" for key in keys)
        raise InputError(f"{folder} holds a run with other values of {values}; choose another --run_dir or delete it")
    damages = {}
    for checkpoint in reversed(saved):
        if damage := damage_of(checkpoint):
            damages[checkpoint] = damage
            continue
        return checkpoint, damages
    raise InputError(
        f"{folder}: every checkpoint is damaged, the newest too ({damages[saved[-1]]}); restore one from a backup, or "
        "choose another --run_dir"
    )


def damage_of(checkpoint: Path) -> str:
    """What differs between a checkpoint's files and its manifest, in a few words; "" if nothing does."""
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in expected.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files = {}
    if not files:
        return f"no readable {MANIFEST}"
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not os.path.isfile(file) or file.stat().st_size != size:
            return f"{name} is missing or of another size"
        if _sha256(file) != digest:
            return f"{name} has other contents"
    return ""


def claim_run_dir(config: Config) -> IO[str]:
    """Make the run's folder this process's own and write the resolved config into it.

    Returns an open file: the claim lasts until it is closed, or the process ends however it may. InputError if another
    process has the folder, or it can't be written.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = (folder / "lock").open("w")
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "config.partial").write_text(config_toml(config), encoding="utf-8")
        os.replace(folder / "config.partial", folder / "config.toml")  # a torn one could not be resumed from
    except BlockingIOError:
        raise InputError(
            f"{folder}: another process is at work there; wait for it or choose another --run_dir"
        ) from None
    except OSError as error:
        raise InputError(f"{folder}: can't hold a run ({error.strerror}); choose another --run_dir") from None
    return claim


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if not path.suffix)


class Checkpoints:
    """Saves a run's checkpoints, in a thread of its own wherever memory allows a copy of what is saved.

    Kept are the newest `config.keep_checkpoints`, and the best on validation (`progress["best"]["step"]`).
    """

    def __init__(self, config: Config) -> None:
        self.folder, self.kept = Path(config.run_dir) / "checkpoints", config.keep_checkpoints
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, model: Qwen2VL, optimizer: MasterAdamW, progress: dict[str, Any]) -> Path:
        """Write `step-NNNNNN`; `progress` holds the finished steps ("step") and all else to resume from.

        It may still be on its way when this returns: `finish` waits for it, and so does the next one.

        Raises:
            InputError: this one, or the one before, can't be written.
        """
        self.finish()
        told = json.dumps(progress)  # as it is now
        final = self.folder / f"step-{progress['step']:06d}"
        best = progress.get("best", {}).get("step")
        state = optimizer.state()
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *state.values()))
        if available_memory() < 2 * size:  # the copy, and as much again for the run
            self._write(final, model, None, state, told, best)
        else:
            copies = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            self._saving = self._pool.submit(self._write, final, model, published_tensors(model), copies, told, best)
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
                shutil.rmtree(leftover)
            save_model(model, partial, weights)
            write_tensors(state, partial / "optimizer.safetensors")
            (partial / "progress.json").write_text(progress, encoding="utf-8")
            commit(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"{final}: can't save the checkpoint ({error}); make room or mend the disk, and the same command goes on "
                f"from {self.newest()}"
            ) from None
        for old in checkpoints(self.folder.parent)[: -self.kept]:
            if old.name != f"step-{best or 0:06d}":
                going = old.with_suffix(".partial")  # a kill while it is deleted leaves nothing that looks whole
                os.replace(old, going)
                shutil.rmtree(going)


def commit(partial: Path, final: Path) -> None:
    """Give a folder that is written its manifest and its name; before it has that name, all of it is on the disk."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*files, partial / MANIFEST, partial):
        _flush(path)
    if final.exists():  # of a run that was resumed from before it
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(final.parent)


def available_memory() -> int:
    """Bytes of memory that the host can still give this process; 0 where that can't be told."""
    try:
        lines = Path("/proc/meminfo").read_text().split("\n")
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
        return free
    except (OSError, ValueError, StopIteration):
        return 0


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint_model(config: Config, checkpoint: Path, base: Path) -> Qwen2VL:
    """The policy as it was saved; its tokenizer files go on coming from the base model's folder."""
    model = load_model(checkpoint, config.device, config.dtype)
    model.source = base
    return model


def load_progress(checkpoint: Path, optimizer: MasterAdamW) -> dict[str, Any]:
    """Give the optimiser its state back; returns `progress` and the number of finished steps under "step"."""
    try:
        optimizer.load_state(load_file(checkpoint / "optimizer.safetensors"))
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        if type(progress["step"]) is not int or progress["step"] < 0:
            raise TypeError("progress.json does not say how many steps are finished")
        if not all(type(progress[name]) in (int, float) for name in ("seconds", "tokens")):
            raise TypeError("progress.json does not say what has been spent")
        return progress
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:  # shapes; depth
        raise InputError(
            f"{checkpoint}: not a whole checkpoint ({error}); delete it to resume from the one before"
        ) from None
