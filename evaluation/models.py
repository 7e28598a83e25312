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

from .report.curves import Metrics, read_metrics

TRAINED_ALIKE = ("model", "train_questions", "image_dir", "train_modality", "train_count",
                 "test_fraction", "validation_fraction", "seed", "min_pixels", "max_pixels",
                 "max_prompt_tokens", "too_long")  # fmt: skip
"""Fields in which the compared runs must agree: same base, same questions (the seed draws them),
same pixels.
"""
RUNS = {"sft": "_sft", "blind": "_blind", "grpo": ""}
"""What their folders' names have behind that of the config's run."""

Folders = dict[str, Path]


def model_folders(config: Config, names: Sequence[str]) -> Folders:
    """Name -> checkpoint folder: "base" is the config's model, "grpo" the run's result, "sft" that
    of the run whose folder is called so with "_sft" behind, "blind" that of a GRPO run with
    "_blind" behind, which was trained without its images; "name=folder" is any other.

    Raises:
        InputError: a folder is missing, a name is odd or given twice, or a run was trained on
            something else.
    """
    folders: Folders = {}
    for given in names:
        name, _, other = given.partition("=")
        # Names stand in files, tables and messages.
        if name in folders or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(
                f"--models: {name!r} is no name of its own; use letters, digits, '.', '_' and '-'"
            )
        if other:
            folder = Path(other)
        elif name == "base":
            folder = model_folder(config.model)
        elif name in RUNS:
            folder = Path(config.run_dir.rstrip("/") + RUNS[name]) / "model"  # runs/x/ is runs/x
        else:
            raise InputError(
                f"--models: {name!r} is unknown; give base, sft, blind, grpo or NAME=FOLDER"
            )
        if not folder.is_dir():
            raise InputError(
                f"{name}: there is no model in {folder}; train it (`make train`, `make sft`), "
                "correct the folder, or leave it out of --models"
            )
        # NAME=FOLDER is the user's own comparison, of whatever was trained on whatever.
        if not other and name in RUNS:
            _refuse_other_training(config, name, folder.parent / "config.toml")
        folders[name] = folder
    return folders


def usual_models(run_dir: str) -> list[str]:
    """What is compared unless --models says otherwise: base, SFT and GRPO, and before the last the
    run that was trained blind, where there is one.
    """
    has_blind = Path(run_dir.rstrip("/") + RUNS["blind"], "model").is_dir()
    return ["base", "sft", *["blind"] * has_blind, "grpo"]


def _refuse_other_training(config: Config, name: str, file: Path) -> None:
    trained = load_config(file)
    for field in TRAINED_ALIKE:
        if _resolved(config, field) != _resolved(trained, field):
            raise InputError(
                f"{name}: not comparable, trained with {field} {getattr(trained, field)!r} "
                f"({file}), not {getattr(config, field)!r}; train it anew, or give the same "
                f"--{field}"
            )
    sees, method = trained.images == "own", "sft" if name == "sft" else "grpo"
    if trained.method != method or sees == (name == "blind"):
        raise InputError(
            f"{name}: {file} is of a run by {trained.method} with images = {trained.images!r}; "
            "name it yourself with --models NAME=FOLDER"
        )


def _resolved(config: Config, field: str) -> Any:
    value = getattr(config, field)
    # Most texts are paths, which may be written in two ways; the others stay different or equal.
    return Path(value).resolve() if isinstance(value, str) else value


def model_digest(folder: Path) -> str:
    """Of all that decides what a checkpoint folder answers, so that a model that has changed is
    asked anew.
    """
    hashed = hashlib.sha256()
    for file in sorted(folder.iterdir()):  # the disk has an order of its own
        if file.suffix in (".safetensors", ".json", ".jinja"):
            with file.open("rb") as opened:
                contents = hashlib.file_digest(opened, "sha256").digest()
            hashed.update(file.name.encode() + contents)
    return hashed.hexdigest()[:16]


def results_folder(run_dir: str, models: Sequence[str], files: Sequence[str]) -> Path:
    """Where an evaluation's results go: eval/ in the run's folder for the usual models and the
    config's questions. Any other has a folder of its own, named after its models and question
    files, so that it does not replace the whole one's results.
    """
    names = () if list(models) == usual_models(run_dir) else models
    return Path(run_dir) / "-".join(["eval", *names, *[Path(file).stem for file in files]])


def training_curves(folders: Folders) -> dict[str, list[Metrics]]:
    """By model the metrics of its training, if its folder lies in that of a run."""
    curves = {}
    for name, folder in folders.items():
        file = folder.parent / "metrics.jsonl"
        if file.exists():
            curves[name] = read_metrics(file)
    return curves
