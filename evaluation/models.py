"""The models that an evaluation compares: their folders, and a check that they are comparable."""

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
"""Fields that must be equal in the compared runs: same base, same questions (the seed draws them),
same pixels.
"""
RUNS = {"sft": "_sft", "blind": "_blind", "grpo": ""}
"""Model name -> suffix that its run folder adds to that of the config's run."""

Folders = dict[str, Path]


def model_folders(config: Config, names: Sequence[str]) -> Folders:
    """The checkpoint folder of each name.

    "base" is the config's model and "grpo" the result of its run. "sft" and "blind" are the results
    of the runs with "_sft" and "_blind" after the run folder's name; "blind" is GRPO trained
    without the images. "name=folder" is any other model.

    Raises:
        InputError: a folder is missing, a name is invalid or given twice, or a run was trained on
            something else.
    """
    folders: Folders = {}
    for given in names:
        name, _, other = given.partition("=")
        # Names appear in files, tables and messages.
        if name in folders or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(
                f"--models: the name {name!r} is invalid or given twice; use letters, digits, '.', "
                "'_' and '-', and each name once"
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
                "correct the folder, or leave the name out of --models"
            )
        # NAME=FOLDER is the user's own choice: its training is not checked.
        if not other and name in RUNS:
            _refuse_other_training(config, name, folder.parent / "config.toml")
        folders[name] = folder
    return folders


def usual_models(run_dir: str) -> list[str]:
    """The models compared by default: base, SFT and GRPO, and the blind run if it was trained."""
    has_blind = Path(run_dir.rstrip("/") + RUNS["blind"], "model").is_dir()
    return ["base", "sft", *["blind"] * has_blind, "grpo"]


def _refuse_other_training(config: Config, name: str, file: Path) -> None:
    trained = load_config(file)
    for field in TRAINED_ALIKE:
        if _resolved(config, field) != _resolved(trained, field):
            raise InputError(
                f"{name}: not comparable, trained with {field} {getattr(trained, field)!r} "
                f"({file}), not {getattr(config, field)!r}; train it again, or set the same {field}"
            )
    sees, method = trained.images == "own", "sft" if name == "sft" else "grpo"
    if trained.method != method or sees == (name == "blind"):
        raise InputError(
            f"{name}: {file} has method = {trained.method!r} and images = {trained.images!r}; give "
            "the model another name with --models NAME=FOLDER"
        )


def _resolved(config: Config, field: str) -> Any:
    value = getattr(config, field)
    # Most strings are paths, which can be spelled in several ways; the others stay comparable.
    return Path(value).resolve() if isinstance(value, str) else value


def model_digest(folder: Path) -> str:
    """A digest of a checkpoint folder's weights, config and tokenizer, to detect changes."""
    hashed = hashlib.sha256()
    for file in sorted(folder.iterdir()):  # iterdir has no fixed order
        if file.suffix in (".safetensors", ".json", ".jinja"):
            with file.open("rb") as opened:
                contents = hashlib.file_digest(opened, "sha256").digest()
            hashed.update(file.name.encode() + contents)
    return hashed.hexdigest()[:16]


def results_folder(run_dir: str, models: Sequence[str], files: Sequence[str]) -> Path:
    """The folder for an evaluation's results: eval/ in the run folder for the default models and
    the config's questions. Others get a folder named after their models and question files, so that
    they do not replace the results of the full evaluation.
    """
    names = () if list(models) == usual_models(run_dir) else models
    return Path(run_dir) / "-".join(["eval", *names, *[Path(file).stem for file in files]])


def training_curves(folders: Folders) -> dict[str, list[Metrics]]:
    """The training metrics of each model whose folder is in a run folder."""
    curves = {}
    for name, folder in folders.items():
        file = folder.parent / "metrics.jsonl"
        if file.exists():
            curves[name] = read_metrics(file)
    return curves
