"""A run's folder: who may work in it, which config it belongs to, and where a run goes on from."""

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
    """Within, the run's folder is this process's own, and ends to be so however it ends.

    InputError if another process has it, or it can't be written.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"{folder}: can't hold a run ({error.strerror}); {ELSEWHERE}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            reason = "another process is at work there; wait for it or"
            raise InputError(f"{folder}: {reason} {ELSEWHERE}") from None
        yield


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint to go on from; newer ones that are damaged are moved aside, loudly."""
    checkpoint, damages = resumable(config)
    for damaged, damage in damages.items():
        aside = damaged.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(damaged, aside)
        line = f"{damaged} is damaged ({damage}): moved to {aside.name}, passed over"
        print(line, file=sys.stderr)
    return checkpoint


def resumable(config: Config) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, or None for a fresh start; and newer ones with their damage.

    A run without checkpoint or result is begun anew. InputError if the folder holds a run that
    this config may not resume, or checkpoints of which none is whole.
    """
    folder = Path(config.run_dir)
    saved = checkpoints(folder)
    if not saved:
        _refuse_to_forget(folder, config)
        return None, {}
    _refuse_other_config(folder, config)
    damages: dict[Path, str] = {}
    for checkpoint in reversed(saved):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint, damages
        damages[checkpoint] = damage
    raise InputError(
        f"{folder}: every checkpoint is damaged, the newest too ({damages[saved[-1]]}); restore "
        f"one from a backup, or {ELSEWHERE}"
    )


def _refuse_other_config(folder: Path, config: Config) -> None:
    """Two runs that are mixed are both worthless: InputError names the fields that differ."""
    try:
        begun_with = load_config(folder / "config.toml")
    except InputError as error:
        reason = f"begun with a config that can't be read ({error})"
        raise InputError(f"{folder}: {reason}; {ELSEWHERE}") from None
    unlike = []
    for one in fields(Config):
        there, here = getattr(begun_with, one.name), getattr(config, one.name)
        if there != here and not one.metadata["may_change"]:
            unlike.append(f"{one.name} ({there} there, {here} here)")
    if unlike:
        raise InputError(
            f"{folder} holds a run with other values of {', '.join(unlike)}; {ELSEWHERE}"
        )


def _refuse_to_forget(folder: Path, config: Config) -> None:
    """InputError if a run has left records but no checkpoint: they would be overwritten."""
    if (folder / "model").exists():
        raise InputError(f"{folder} holds a finished run; {ELSEWHERE}")
    metrics = folder / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    away = (folder / "checkpoints").is_symlink() and not (folder / "checkpoints").exists()
    # The second checkpoint waits for the first: by then there was one on the disk.
    if steps > 2 * config.save_every or away:
        raise InputError(
            f"{folder}: has records of {steps} steps, but no checkpoint; bring "
            f"{folder / 'checkpoints'} back (is a disk not mounted?), or {ELSEWHERE}"
        )


def write_config(config: Config) -> None:
    """Leave the resolved config in the run's folder; a torn one could not be resumed from."""
    folder = Path(config.run_dir)
    (folder / "config.partial").write_text(config_toml(config), encoding="utf-8")
    os.replace(folder / "config.partial", folder / "config.toml")


def refuse_other_contents(config: Config, begun_with: dict[str, str], now: dict[str, str]) -> None:
    """InputError if a run was begun with other questions or weights than it has now (digests)."""
    for name, digest in now.items():
        if begun_with.get(name) != digest:
            raise InputError(
                f"{config.run_dir}: begun with other {name} than these; restore them, or "
                f"{ELSEWHERE}"
            )


def questions_digest(questions: Sequence[Question]) -> str:
    """Of the questions in their order, wherever their images lie."""
    rows = []
    for one in questions:
        names = [path.name for path in one.images]
        rows.append((one.question, one.options, one.answer, one.modality, names))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Of a checkpoint folder's safetensors."""
    digests = "".join(sha256_of(file) for file in weight_files(folder))
    return hashlib.sha256(digests.encode()).hexdigest()[:16]
