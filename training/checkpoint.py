"""The checkpoint format, and its integrity check.

A checkpoint is a folder `checkpoints/step-000100/` with the model in Hugging Face layout, the
optimiser's tensors, `progress.json`, and a manifest of every file's size and SHA-256. All files are
safetensors or text. The folder is written under a temporary name, flushed to disk and then renamed,
so a half-written checkpoint is never mistaken for a whole one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import InputError
from common.files import read_json
from grpo.optimizer import MasterAdamW

MANIFEST = "manifest.json"


@dataclass
class Progress:
    """How far a run has come, and the other state that it needs when it is resumed.

    Attributes:
        step: number of finished steps.
        seconds, tokens: total time of these steps, and the number of tokens sampled in them.
        bad_steps: latest consecutive steps whose loss or gradient was not finite.
        validated: number of finished steps at the last validation.
        best: the best validation so far ("step", counted in finished steps; "right"; "total"), or
            empty.
        answers_before: the base model's greedy answers to the test questions; None if they have
            not been computed yet.
        contents: digests of the base weights and the questions, by name.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    bad_steps: int = 0
    validated: int = 0
    best: dict[str, int] = field(default_factory=dict)
    answers_before: list[str] | None = None
    contents: dict[str, str] = field(default_factory=dict)


def checkpoints(run_dir: Path) -> list[Path]:
    """The paths of a run's checkpoints, oldest first. Copies under other names don't count."""
    numbered = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        if match := re.fullmatch(r"step-(\d{6,})", path.name):
            numbered[int(match[1])] = path
    return [numbered[step] for step in sorted(numbered)]


def damage_of(checkpoint: Path) -> str:
    """Check a checkpoint against its manifest. Returns a short description of the damage, or ""."""
    try:
        manifest = read_json(checkpoint / MANIFEST, "restore it")
        for name, entry in manifest.items():
            file = checkpoint / name
            # Sizes first: they reveal a truncated file without reading gigabytes.
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return f"{name} is missing or has the wrong size"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (ValueError, KeyError, TypeError, AttributeError):  # not a manifest
        manifest = {}
    return "" if manifest else f"{MANIFEST} is missing or unreadable"


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """Yields a temporary folder to write into; on exit it is renamed to `final`.

    By then all files and a manifest are on disk. Raises OSError, and leaves nothing behind, if
    they can't be written.
    """
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process may have left one
    partial.mkdir(parents=True)
    try:
        yield partial
        _commit(partial, final)
    except OSError:
        # On a full disk, half a checkpoint would take up the space that the next one needs.
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _commit(partial: Path, final: Path) -> None:
    """Write the manifest, flush all files to disk, and rename the folder."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {}
    for file in files:
        name = str(file.relative_to(partial))
        manifest[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*files, partial / MANIFEST, partial):
        _flush(path)
    if final.exists():  # saved again: moved away first, so that `final` is never half old, half new
        aside = final.with_suffix(".old.partial")
        os.replace(final, aside)
        os.replace(partial, final)
        shutil.rmtree(aside)
    else:
        os.replace(partial, final)
    _flush(final.parent)  # the new name


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_progress(checkpoint: Path, optimizer: MasterAdamW) -> Progress:
    """Load the optimiser's state from a checkpoint, and return the run's progress."""
    try:
        optimizer.load_state(load_file(checkpoint / "optimizer.safetensors"))
        values = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        return Progress(**{one.name: values[one.name] for one in fields(Progress)})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        remedy = "restore it, or move it away to resume from the previous one"
        raise InputError(f"{checkpoint}: incomplete checkpoint ({error}); {remedy}") from None
