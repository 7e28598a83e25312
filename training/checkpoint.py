"""A checkpoint on disk: what is in it, and how it is known to be whole.

A folder `checkpoints/step-000100/` with the model in Hugging Face layout, the optimiser's tensors
and `progress.json`: safetensors and text only, and a manifest of every file's size and SHA-256. It
is written beside its place, flushed to the disk and renamed, so that a half-written one never
counts.
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
    """How far a run has come, and what else it must know when it is resumed.

    Attributes:
        step: finished steps.
        seconds, tokens: spent on them, and sampled in them.
        bad_steps: steps in a row that were not finite.
        validated: the number of finished steps at the last validation.
        best: the best validation so far: "step" (finished ones), "right", "total"; or empty.
        answers_before: the base's greedy answers to the test questions; None until it was asked.
        contents: digests of what the run works on, by name.
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
    """The whole checkpoints of a run, oldest first. A copy by another name is none."""
    numbered = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        if match := re.fullmatch(r"step-(\d{6,})", path.name):
            numbered[int(match[1])] = path
    return [numbered[step] for step in sorted(numbered)]


def damage_of(checkpoint: Path) -> str:
    """What differs between a checkpoint's files and its manifest, in a few words, or ""."""
    try:
        manifest = read_json(checkpoint / MANIFEST, "restore it")
        for name, entry in manifest.items():
            file = checkpoint / name
            # Sizes first: a torn file is then known without reading gigabytes.
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return f"{name} is missing or of another size"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} has other contents"
    except (ValueError, KeyError, TypeError, AttributeError):  # not ours, or nonsense
        manifest = {}
    return "" if manifest else f"no readable {MANIFEST}"


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `final` when the context is left.

    By then all of it is on the disk, with a manifest. OSError, and no trace, if it can't be
    written.
    """
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # a kill may have left one
    partial.mkdir(parents=True)
    try:
        yield partial
        _commit(partial, final)
    except OSError:
        # On a full disk, half a checkpoint would take the room that the next one needs.
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _commit(partial: Path, final: Path) -> None:
    """Give a written folder its manifest and its name."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {}
    for file in files:
        name = str(file.relative_to(partial))
        manifest[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*files, partial / MANIFEST, partial):
        _flush(path)
    if final.exists():  # saved once more: out of the way first, so that the name is never torn
        aside = final.with_suffix(".old.partial")
        os.replace(final, aside)
        os.replace(partial, final)
        shutil.rmtree(aside)
    else:
        os.replace(partial, final)
    _flush(final.parent)  # the name itself


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_progress(checkpoint: Path, optimizer: MasterAdamW) -> Progress:
    """Give the optimiser its state back; returns how far the run had come."""
    try:
        optimizer.load_state(load_file(checkpoint / "optimizer.safetensors"))
        values = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        return Progress(**{one.name: values[one.name] for one in fields(Progress)})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        remedy = "restore it, or move it away to resume from the one before"
        raise InputError(f"{checkpoint}: not a whole checkpoint ({error}); {remedy}") from None
