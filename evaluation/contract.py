"""The contract: everything that must be equal for two evaluations to be comparable.

Two evaluations are comparable if they ask the same questions with the same prompt and pixels, allow
the same answer length, compute in the same precision, and read answers by the same rules. Each term
has its own digest, so that an error can name the one that differs. Every row of an evaluation holds
the hash over all terms. Code is hashed by its source text: even a changed comment makes a new
contract, which errs on the safe side.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import rewards.letter
import rewards.rules
from common.config import Config
from common.errors import InputError
from common.files import read_json
from data import PromptEncoder, Question, encode, images, prompt

REMEDY = "give the eval/ folder of a run, or delete it and run evaluate.py again"
Terms = dict[str, Any]


def contract(config: Config, encoder: PromptEncoder, questions: Sequence[Question]) -> Terms:
    """The terms of the contract by name, and "hash" over all of them."""
    terms = {
        "prompt": prompt_digest(encoder),
        "pixels": digest(_source(images)),
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
        "parser": digest(_source(rewards.letter), _source(rewards.rules)),
        "questions": digest(*map(_contents, questions)),
        "number of questions": len(questions),
    }
    # Sorted, so that the hash does not depend on the order of the terms above.
    return terms | {"hash": digest(json.dumps(terms, sort_keys=True))}


def prompt_digest(encoder: PromptEncoder) -> str:
    """The digest of the text around a question: our template and the checkpoint's chat template."""
    return digest(_source(prompt), _source(encode), encoder.tokenizer.chat_template or "")


def claim(folder: Path, ours: Terms) -> None:
    """Write the contract to the folder of an evaluation.

    Raises:
        InputError: the folder holds an evaluation with a different contract.
    """
    file = folder / "contract.json"
    if file.exists():
        refuse_unlike(ours, read_contract(folder), f"{folder} (delete it, or choose another --out)")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def read_contract(folder: Path) -> Terms:
    """Read the contract of an evaluation's folder. InputError if it can't be read."""
    file = folder / "contract.json"
    terms = read_json(file, REMEDY)
    if not isinstance(terms, dict):
        raise InputError(f"{file}: not readable as a contract; {REMEDY}")
    return terms


def refuse_unlike(ours: Terms, theirs: Terms, where: str) -> None:
    """Raise InputError with the terms that differ, if any. `where` names the other evaluation."""
    differing = []
    for name, value in ours.items():
        if name != "hash" and theirs.get(name) != value:  # a different hash explains nothing
            differing.append(f"{name} ({theirs.get(name)} there, {value} here)")
    if differing:
        raise InputError(f"{where}: not comparable, different {', '.join(differing)}")


def digest(*texts: str) -> str:
    """16 hexadecimal digits of the SHA-256 of `texts`; the boundaries between them count."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _contents(question: Question) -> str:
    """The content of a question, independent of its file paths."""
    # The bytes of an image, not its name: a folder may move between two evaluations.
    pixels = [hashlib.sha256(image.read_bytes()).hexdigest() for image in question.images]
    return json.dumps(
        [pixels, question.question, question.options, question.answer, question.modality]
    )


def _source(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text(encoding="utf-8")
