"""Which models an evaluation compares: their folders, what they were trained on, and whether that
may be compared.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import Config, load_config
from common.errors import InputError
from common.hub import model_folder

TRAINED_ALIKE = ("model", "train_questions", "image_dir", "train_modality", "train_count", "test_fraction",
                 "validation_fraction", "seed",
                 "min_pixels", "max_pixels", "max_prompt_tokens", "too_long")  # fmt: skip
"""Fields in which the compared runs must agree: same base, same questions (the seed draws them),
same pixels.
"""
PATHS = ("model", "train_questions", "image_dir")
REMEDY = {
    "grpo": "train it with `make train`",
    "sft": "train it with train.py and the config ..._sft.toml (or `make sft`)",
}


def model_folders(config: Config, names: Sequence[str]) -> dict[str, Path]:
    """Name -> checkpoint folder: "base" is the config's model, "grpo" the run's result, "sft" that
    of the run whose folder is called so with "_sft" behind; "name=folder" is any other.

    Raises:
        InputError: a folder is missing, a name is odd or given twice, or a run was trained on
            something else.
    """
    known = {"base": Path(config.model), "grpo": Path(config.run_dir) / "model",
             "sft": Path(config.run_dir.rstrip("/") + "_sft") / "model"}  # fmt: skip
    folders: dict[str, Path] = {}
    for given in names:
        name, equals, folder = given.partition("=")
        if not equals and name not in known:
            raise InputError(
                f"--models: {name!r} is unknown; give {', '.join(known)} or NAME=FOLDER"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(
                f"--models: {name!r} is no name; use letters, digits, '.', '_' and '-'"
            )
        if name in folders:
            raise InputError(
                f"--models: {name!r} is given twice; give each model a name of its own"
            )
        folders[name] = Path(folder) if equals else known[name]
        if not equals and name == "base":
            folders[name] = model_folder(config.model)
        if not folders[name].is_dir():
            advice = (
                "correct the folder" if equals else f"{REMEDY[name]}, or leave it out of --models"
            )
            raise InputError(f"{name}: there is no model in {folders[name]}; {advice}")
        if not equals and name != "base":
            _refuse_other_training(config, name, folders[name].parent / "config.toml")
    if not folders:
        raise InputError("--models names none; give for instance --models base,grpo")
    return folders


def _refuse_other_training(config: Config, name: str, file: Path) -> None:
    trained = load_config(file)
    ours, theirs = (
        {field: _value(run, field) for field in TRAINED_ALIKE} for run in (config, trained)
    )
    for field in TRAINED_ALIKE:
        if ours[field] != theirs[field]:
            raise InputError(
                f"{name}: not comparable, trained with {field} {getattr(trained, field)!r} ({file}), not "
                f"{getattr(config, field)!r}; train it anew, or give the same --{field}"
            )
    if trained.method != name:
        raise InputError(
            f"{name}: {file} is of a run by {trained.method}; name it yourself with --models NAME=FOLDER"
        )


def _value(config: Config, field: str) -> Any:
    value = getattr(config, field)
    return str(Path(value).resolve()) if field in PATHS and value else value


def model_digest(folder: str | Path) -> str:
    """Of all that decides what a checkpoint folder answers, so that a model that has changed is
    asked anew.
    """
    hashed = hashlib.sha256()
    for file in sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix in (".safetensors", ".json", ".jinja")
    ):
        with file.open("rb") as opened:
            hashed.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return hashed.hexdigest()[:16]
