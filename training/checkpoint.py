"""A run on disk: the resolved config, and checkpoints to resume from.

A checkpoint is a folder `checkpoints/step-000100/` with the model in Hugging Face layout, the
optimiser's tensors and a small JSON: safetensors and text only, and a manifest of every file's size
and SHA-256. It is written beside its place, flushed to the disk and renamed, so that a half-written
one never counts; one whose files are not those of its manifest is passed over, loudly, for the one
before it.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from common.config import Config, config_toml
from common.errors import InputError
from common.hub import weight_files
from data import Question
from grpo.optimizer import MasterAdamW
from model import Qwen2VL, load_model
from model.weights import read_companions

MAY_DIFFER = {
    "run_dir",  # a run may be moved,
    "model",  # and so may these: what they hold is compared, by `same_contents`
    "train_questions",
    "validation_questions",
    "test_questions",
    "image_dir",
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
"""Fields that a resumed run may change: they change nothing but speed, memory, what is written down
and where it lies.
"""

MANIFEST = "manifest.json"

_OF_PROGRESS = {
    "bad_steps": int,
    "validated": int,
    "best": dict,
    "answers_before": list,
    "contents": dict,
}


def find_checkpoint(config: Config) -> Path | None:
    """`resumable`'s checkpoint. Newer ones that are damaged are moved aside; apart from that, it
    writes nothing.
    """
    checkpoint, damages = resumable(config)
    for damaged, damage in damages.items():
        aside = damaged.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(damaged, aside)
        print(
            f"{damaged} is damaged ({damage}): moved to {aside.name}, passed over", file=sys.stderr
        )
    return checkpoint


def resumable(config: Config) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that this config may resume from, or None for a fresh start; newer ones
    and their damage.

    InputError if the folder holds checkpoints of a config that differs in more than `MAY_DIFFER`
    (mixing two runs would make both worthless), or none that is whole. A run without checkpoint or
    result is begun anew.
    """
    folder = Path(config.run_dir)
    saved = checkpoints(folder)
    if not saved and (folder / "model").exists():
        raise InputError(f"{folder} holds a finished run; choose another --run_dir")
    if not saved:
        _refuse_to_forget(folder, config)
        return None, {}
    try:
        theirs = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder}: its config.toml can't be read ({error}); choose another --run_dir"
        ) from None
    ours = tomllib.loads(config_toml(config))
    theirs = {
        field.name: field.default for field in fields(Config)
    } | theirs  # fields that came later
    keys = sorted(
        key
        for key in (ours.keys() | theirs.keys()) - MAY_DIFFER
        if ours.get(key) != theirs.get(key)
    )
    if keys:
        values = ", ".join(f"{key} ({theirs.get(key)} there, {ours.get(key)} here)" for key in keys)
        raise InputError(
            f"{folder} holds a run with other values of {values}; choose another --run_dir"
        )
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
    """What differs between a checkpoint's files and its manifest, in a few words; "" if nothing
    does.
    """
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
        if sha256_of(file) != digest:
            return f"{name} has other contents"
    return ""


def claim_run_dir(config: Config) -> IO[str]:
    """Make the run's folder this process's own.

    Returns an open file: the claim lasts until it is closed, or the process ends however it may.
    InputError if another process has the folder, or it can't be written.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = (folder / "lock").open("w")
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder}: another process is at work there; wait for it or choose another --run_dir"
        ) from None
    except OSError as error:
        raise InputError(
            f"{folder}: can't hold a run ({error.strerror}); choose another --run_dir"
        ) from None
    return claim


def write_config(config: Config) -> None:
    """Leave the resolved config in the run's folder; a torn one could not be resumed from."""
    folder = Path(config.run_dir)
    (folder / "config.partial").write_text(config_toml(config), encoding="utf-8")
    os.replace(folder / "config.partial", folder / "config.toml")


def same_contents(config: Config, progress: dict[str, Any], found: dict[str, str]) -> None:
    """Note in `progress` what a run works on, digests by name; InputError if it was begun with
    something else.
    """
    known = progress.setdefault("contents", found)
    for name, digest in found.items():
        if known.get(name) != digest:
            raise InputError(
                f"{config.run_dir}: begun with other {name} than these; restore them, or choose another --run_dir"
            )


def questions_digest(questions: Sequence[Question]) -> str:
    """Of what is asked, in its order; wherever the images lie."""
    told = [
        (one.question, one.options, one.answer, one.modality, [path.name for path in one.images])
        for one in questions
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Of a checkpoint folder's safetensors."""
    return hashlib.sha256(
        "".join(sha256_of(file) for file in weight_files(folder)).encode()
    ).hexdigest()[:16]


def _refuse_to_forget(folder: Path, config: Config) -> None:
    """InputError if a run that must have had checkpoints has none: begun anew, its records would be
    overwritten.
    """
    metrics = folder / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    # By then the first checkpoint was on the disk: the second waits for it.
    if steps > 2 * config.save_every or (
        (folder / "checkpoints").is_symlink() and not (folder / "checkpoints").exists()
    ):
        raise InputError(
            f"{folder}: has records of {steps} steps, but no checkpoint; bring {folder / 'checkpoints'} back (is a disk not "
            "mounted?), or choose another --run_dir"
        )


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. A copy by another name is none."""
    found = (
        path
        for path in (run_dir / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d{6,}", path.name)
    )
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_checkpoint_model(config: Config, checkpoint: Path, base: Path) -> Qwen2VL:
    """The policy as it was saved; its tokenizer files go on coming from the base model's folder."""
    model = load_model(checkpoint, config.device, config.dtype)
    model.companions = read_companions(base)
    return model


def load_progress(checkpoint: Path, optimizer: MasterAdamW) -> dict[str, Any]:
    """Give the optimiser its state back; returns `progress` and the number of finished steps under
    "step".
    """
    try:
        optimizer.load_state(load_file(checkpoint / "optimizer.safetensors"))
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        if type(progress["step"]) is not int or progress["step"] < 0:
            raise TypeError("progress.json does not say how many steps are finished")
        if not all(type(progress[name]) in (int, float) for name in ("seconds", "tokens")):
            raise TypeError("progress.json does not say what has been spent")
        for name, kind in _OF_PROGRESS.items():
            if not isinstance(progress.get(name, kind()), kind):
                raise TypeError(f"progress.json has nonsense under {name}")
        if not all(
            type(progress.get("best", {}).get(name, 0)) is int
            for name in ("step", "right", "total")
        ):
            raise TypeError("progress.json has nonsense under best")
        return progress
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        SafetensorError,
    ) as error:  # shapes; depth
        raise InputError(
            f"{checkpoint}: not a whole checkpoint ({error}); restore it, or move it away to resume from the one before"
        ) from None
