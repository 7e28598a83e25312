"""The data contract: all that decides what an answer means, so that only like is compared with
like.

Two evaluations may be compared if they asked the same questions, with the same words and pixels,
let the answer be equally long, computed in the same precision, and read the answer by the same
rules. Each of these has a digest of its own, so that a refusal can say which one differs; the hash
over all of them stands in every row that an evaluation writes. Code counts by its source text: even
another comment makes another contract: the safe side.
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
    """The terms of the contract, by name, and "hash" over them all."""
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
    # Sorted: the hash must not depend on the order in which the terms stand here.
    return terms | {"hash": digest(json.dumps(terms, sort_keys=True))}


def prompt_digest(encoder: PromptEncoder) -> str:
    """Of the words around a question: our template and the checkpoint's chat template."""
    return digest(_source(prompt), _source(encode), encoder.tokenizer.chat_template or "")


def claim(folder: Path, ours: Terms) -> None:
    """Write the contract into the folder of an evaluation.

    Raises:
        InputError: the folder holds an evaluation under another contract.
    """
    file = folder / "contract.json"
    if file.exists():
        refuse_unlike(ours, read_contract(folder), f"{folder} (delete it, or choose another --out)")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def read_contract(folder: Path) -> Terms:
    """The contract of an evaluation's folder. InputError if it holds no readable one."""
    file = folder / "contract.json"
    terms = read_json(file, REMEDY)
    if not isinstance(terms, dict):
        raise InputError(f"{file}: not readable as a contract; {REMEDY}")
    return terms


def refuse_unlike(ours: Terms, theirs: Terms, where: str) -> None:
    """InputError if two contracts differ, with what differs; `where` says whose the other is."""
    unlike = []
    for name, value in ours.items():
        if name != "hash" and theirs.get(name) != value:  # a hash tells a reader nothing
            unlike.append(f"{name} ({theirs.get(name)} there, {value} here)")
    if unlike:
        raise InputError(f"{where}: not comparable, because of another {', '.join(unlike)}")


def digest(*texts: str) -> str:
    """16 hexadecimal digits of a SHA-256 over texts; where one ends and the next begins counts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _contents(question: Question) -> str:
    """What is asked, without where its files lie."""
    # The file's bytes and not its name: a folder may move between two evaluations.
    pixels = [hashlib.sha256(image.read_bytes()).hexdigest() for image in question.images]
    return json.dumps(
        [pixels, question.question, question.options, question.answer, question.modality]
    )


def _source(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text(encoding="utf-8")
