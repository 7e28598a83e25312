"""The tokens of a model: its tokenizer, which ids end a completion, and which may be sampled at all."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from model import InputError, Qwen2VLConfig

from .encode import allowed_tokens_V, decode_completion


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`end_ids` end a completion; `allowed_V` is False for image tokens and for embedding rows that no token uses."""

    tokenizer: Any
    end_ids: tuple[int, ...]
    allowed_V: Tensor

    def decode(self, tokens: Tensor) -> str:
        """A completion's ids (T,) -> its text, without the end-of-turn; other special tokens stay visible."""
        return decode_completion(self.tokenizer, tokens, self.end_ids)


def load_vocabulary(folder: str | Path, config: Qwen2VLConfig, device: str = "cpu") -> Vocabulary:
    """Read the tokenizer of a checkpoint folder. InputError if it has none or does not fit the model."""
    folder = Path(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{folder}: no usable tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json"
        ) from None
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model only {config.vocab_size} rows"
        )
    seen_only = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    return Vocabulary(
        tokenizer, _end_ids(folder, tokenizer), allowed_tokens_V(tokenizer, config.vocab_size, seen_only).to(device)
    )


def _end_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """As generation_config.json says, the published models' way; else the tokenizer's own end-of-sequence token."""
    ids: Any = tokenizer.eos_token_id
    file = folder / "generation_config.json"
    if file.exists():
        try:
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", ids)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: not readable as JSON ({error}); copy or download it again") from None
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    if not ids or not all(type(i) is int and 0 <= i < len(tokenizer) for i in ids):
        raise InputError(
            f"{folder}: no valid end-of-turn token (eos_token_id is {ids}) in generation_config.json or the tokenizer"
        )
    return ids
