"""The data contract: all that decides what an answer means, so that only like is compared with
like.

Two evaluations may be compared if they asked the same questions, with the same words and pixels,
let the answer be equally long, computed in the same precision, and read the answer by the same
rules. Each of these is a part with a digest of its own, so that a refusal can say which one
differs; the hash over all of them stands in every row that an evaluation writes. Code counts by its
source text: even another comment makes another contract: the safe side.
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
from data import PromptEncoder, Question, encode, images, prompt


def contract(
    config: Config, encoder: PromptEncoder, questions: Sequence[Question]
) -> dict[str, Any]:
    """The parts of the contract, by name, and "hash" over them all."""
    parts = {
        "prompt": prompt_digest(encoder),
        "pixels": digest(_source(images)),
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
        "parser": digest(_source(rewards.letter), _source(rewards.rules)),
        "questions": digest(*(_asked(question) for question in questions)),
        "number of questions": len(questions),
    }
    return parts | {"hash": digest(json.dumps(parts, sort_keys=True))}


def prompt_digest(encoder: PromptEncoder) -> str:
    """Of the words around a question: our template and the checkpoint's chat template."""
    return digest(_source(prompt), _source(encode), encoder.tokenizer.chat_template or "")


def refuse_unlike(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    """InputError if two contracts differ; `where` says whose the other is, and the message what
    differs.
    """
    unlike = [
        f"{key} ({theirs.get(key)} there, {ours[key]} here)"
        for key in ours
        if ours[key] != theirs.get(key)
    ]
    if unlike:
        reasons = [reason for reason in unlike if not reason.startswith("hash ")]
        raise InputError(
            f"{where}: not comparable, because of another {', '.join(reasons or unlike)}"
        )


def claim(file: Path, ours: dict[str, Any]) -> None:
    """Write the contract, or refuse to go on with an evaluation that was begun under another
    one.
    """
    try:
        if file.exists():
            theirs = dict(json.loads(file.read_bytes()))
            refuse_unlike(ours, theirs, f"{file.parent} (delete it, or choose another --out)")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
    except InputError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: not readable ({error}); delete the folder {file.parent}"
        ) from None
    except OSError as error:
        raise InputError(
            f"{file.parent}: can't hold an evaluation ({error.strerror}); choose another --out"
        ) from None


def digest(*texts: str) -> str:
    """16 hexadecimal digits of a SHA-256 over texts; where one ends and the next begins counts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _asked(question: Question) -> str:
    """What is asked, without where its files lie."""
    shown = [hashlib.sha256(image.read_bytes()).hexdigest() for image in question.images]
    return json.dumps(
        [shown, question.question, question.options, question.answer, question.modality]
    )


def _source(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text(encoding="utf-8")
