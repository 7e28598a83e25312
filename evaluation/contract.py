"""The data contract: all that decides what an answer means, so that only like is compared with like.

Two evaluations may be compared if they asked the same questions, with the same words and pixels, let the answer be
equally long, and read it by the same rules. Each of these is a part with a digest of its own, so that a refusal can say
which one differs; the hash over all of them stands in every row that an evaluation writes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import rewards.letter
import rewards.rules
from data import PromptEncoder, Question, images, prompt
from grpo.config import Config, load_config
from model import InputError


def contract(config: Config, encoder: PromptEncoder, questions: Sequence[Question]) -> dict[str, Any]:
    """The parts of the contract, by name, and "hash" over them all."""
    parts = {
        "prompt": prompt_digest(encoder),
        "pixels": digest(_source(images)),
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "max_new_tokens": config.max_new_tokens,
        "parser": digest(_source(rewards.letter), _source(rewards.rules)),
        "questions": digest(*(_asked(question) for question in questions)),
    }
    return parts | {"hash": digest(json.dumps(parts, sort_keys=True))}


def prompt_digest(encoder: PromptEncoder) -> str:
    """Of the words around a question: our template and the checkpoint's chat template."""
    return digest(_source(prompt), encoder.tokenizer.chat_template or "")


def refuse_unlike(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    """InputError if two contracts differ; `where` says whose the other is, and the message what differs."""
    unlike = [f"{key} ({theirs.get(key)} there, {ours[key]} here)" for key in ours if ours[key] != theirs.get(key)]
    if unlike:
        reasons = [reason for reason in unlike if not reason.startswith("hash ")]
        raise InputError(f"{where}: not comparable, because of another {', '.join(reasons or unlike)}")


def weights_digest(folder: str | Path) -> str:
    """Of a checkpoint folder's weights, so that answers of a model that has been trained anew are not taken for its."""
    hashed = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as opened:
            hashed.update(hashlib.file_digest(opened, "sha256").digest())
    return hashed.hexdigest()[:16]


TRAINED_ALIKE = ("model", "train_questions", "image_dir", "train_modality", "train_count", "test_fraction",
                 "min_pixels", "max_pixels")  # fmt: skip
"""Fields in which the runs that are compared must agree: same base, questions and pixels."""


def claim(file: Path, ours: dict[str, Any]) -> None:
    """Write the contract, or refuse to go on with an evaluation that was begun under another one."""
    if file.exists():
        try:
            theirs = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}: not readable ({error}); delete the folder {file.parent}") from None
        refuse_unlike(ours, theirs, f"{file.parent} (delete it, or choose another --out)")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def model_folders(config: Config, names: Sequence[str]) -> dict[str, Path]:
    """Name -> checkpoint folder: "base" is the config's model, "grpo" the run's result, "sft" that of the run whose
    folder is called so with "_sft" behind; "name=folder" is any other.

    Raises:
        InputError: a folder is missing, a name is unknown or given twice, or a run was trained on something else.
    """
    known = {"base": Path(config.model), "grpo": Path(config.run_dir) / "model",
             "sft": Path(config.run_dir.rstrip("/") + "_sft") / "model"}  # fmt: skip
    folders: dict[str, Path] = {}
    for given in names:
        name, equals, folder = given.partition("=")
        if not equals and name not in known:
            raise InputError(f"--models: {name!r} is unknown; give {', '.join(known)} or NAME=FOLDER")
        if name in folders or not name:
            raise InputError(f"--models: {name!r} is given twice or empty; give each model a name of its own")
        folders[name] = Path(folder) if equals else known[name]
        if not folders[name].is_dir():
            remedy = {"base": "correct `model`", "grpo": "train it with `make train`", "sft": "train it with `make sft`"}
            advice = "correct the folder" if equals else f"{remedy[name]}, or leave it out of --models"
            raise InputError(f"{name}: there is no model in {folders[name]}; {advice}")
        if not equals and name != "base":
            _refuse_other_training(config, name, folders[name].parent / "config.toml")
    if not folders:
        raise InputError("--models names none; give for instance --models base,grpo")
    return folders


def _refuse_other_training(config: Config, name: str, file: Path) -> None:
    trained = load_config(file)
    for field in TRAINED_ALIKE:
        ours, theirs = getattr(config, field), getattr(trained, field)
        if ours != theirs:
            raise InputError(f"{name}: not comparable, trained with {field} {theirs!r} ({file}), not {ours!r}")


def digest(*texts: str) -> str:
    """16 hexadecimal digits of a SHA-256 over texts; where one ends and the next begins counts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _asked(question: Question) -> str:
    """What is asked, without where its files lie."""
    shown = [hashlib.sha256(image.read_bytes()).hexdigest() for image in question.images]
    return json.dumps([shown, question.question, question.options, question.answer, question.modality])


def _source(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text(encoding="utf-8")
