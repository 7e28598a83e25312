"""The run folder: its lock, its config, and the checkpoint that a run resumes from."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from common.config import Config, config_toml, load_config
from common.errors import InputError
from common.hub import weight_files
from data import Question

from .checkpoint import checkpoints, damage_of, sha256_of

ELSEWHERE = "choose another --run_dir"


@contextmanager
def claimed(config: Config) -> Iterator[None]:
    """Hold the lock on the run folder; it is released however the process ends.

    InputError if another process holds it, or the folder can't be written.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        reason = f"can't be used as a run folder ({error.strerror})"
        raise InputError(f"{folder}: {reason}; {ELSEWHERE}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            reason = "another process is using this run folder; wait for it or"
            raise InputError(f"{folder}: {reason} {ELSEWHERE}") from None
        yield


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint to resume from. Newer ones are damaged: they are renamed and reported."""
    checkpoint, damages = resumable(config)
    for damaged, damage in damages.items():
        aside = damaged.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(damaged, aside)
        line = f"{damaged} is damaged ({damage}): renamed to {aside.name} and skipped"
        print(line, file=sys.stderr)
    return checkpoint


def resumable(config: Config) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint (None: start from scratch), and the damage of newer ones.

    InputError if the folder holds a run that can't be resumed with this config, or if every
    checkpoint is damaged.
    """
    folder = Path(config.run_dir)
    saved = checkpoints(folder)
    if not saved:
        _refuse_to_overwrite(folder, config)
        return None, {}
    _refuse_other_config(folder, config)
    damages: dict[Path, str] = {}
    for checkpoint in reversed(saved):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint, damages
        damages[checkpoint] = damage
    raise InputError(
        f"{folder}: every checkpoint is damaged (in the newest, {damages[saved[-1]]}); restore "
        f"one from a backup, or {ELSEWHERE}"
    )


def _refuse_other_config(folder: Path, config: Config) -> None:
    """InputError if the run began with a different config; it names the fields that differ."""
    try:
        begun_with = load_config(folder / "config.toml")
    except InputError as error:
        reason = f"the config of this run can't be read ({error})"
        raise InputError(f"{folder}: {reason}; {ELSEWHERE}") from None
    differences = []
    for one in fields(Config):
        old, new = getattr(begun_with, one.name), getattr(config, one.name)
        if old != new and not one.metadata["may_change"]:
            differences.append(f"{one.name} (was {old}, now {new})")
    if differences:
        raise InputError(
            f"{folder} holds a run with different values of {', '.join(differences)}; {ELSEWHERE}"
        )


def _refuse_to_overwrite(folder: Path, config: Config) -> None:
    """InputError if the folder has records but no checkpoint: a new run would overwrite them."""
    if (folder / "model").exists():
        raise InputError(f"{folder} holds a finished run; {ELSEWHERE}")
    metrics = folder / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    away = (folder / "checkpoints").is_symlink() and not (folder / "checkpoints").exists()
    # Saving the second checkpoint waits for the first, so by then one was on disk.
    if steps > 2 * config.save_every or away:
        raise InputError(
            f"{folder} has records of {steps} steps but no checkpoint; restore "
            f"{folder / 'checkpoints'} (is a disk not mounted?), or {ELSEWHERE}"
        )


def write_config(config: Config) -> None:
    """Write the resolved config to the run folder."""
    folder = Path(config.run_dir)
    # Renamed when complete: a run with a truncated config could not be resumed.
    (folder / "config.partial").write_text(config_toml(config), encoding="utf-8")
    os.replace(folder / "config.partial", folder / "config.toml")


def refuse_other_contents(config: Config, begun_with: dict[str, str], now: dict[str, str]) -> None:
    """InputError if the run began with different questions or weights (both given as digests)."""
    for name, digest in now.items():
        if begun_with.get(name) != digest:
            raise InputError(
                f"{config.run_dir}: this run began with different {name}; restore them, or "
                f"{ELSEWHERE}"
            )


def questions_digest(questions: Sequence[Question]) -> str:
    """Digest of the questions, in order. Image folders don't count, so that a run can be moved."""
    rows = []
    for one in questions:
        names = [path.name for path in one.images]
        rows.append((one.question, one.options, one.answer, one.modality, names))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Digest of a model folder's safetensors files."""
    digests = "".join(sha256_of(file) for file in weight_files(folder))
    return hashlib.sha256(digests.encode()).hexdigest()[:16]
