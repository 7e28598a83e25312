"""A model's tokenizer, the ids that end a completion, and the ids that may be sampled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.errors import InputError, reason
from common.files import check_file, read_json
from model import Qwen2VLConfig
from model.weights import COMPANIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer and its ids: `end_ids` end a completion; `allowed_V` is False for image tokens
    and for embedding rows that no token uses.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    allowed_V: Tensor

    def encode(self, completion: str) -> list[int]:
        """The ids of a completion, without end of turn. Control tokens in the text stay text."""
        tokens = self.tokenizer(completion, add_special_tokens=False, split_special_tokens=True)
        return tokens.input_ids

    def decode(self, tokens: Tensor) -> str:
        """The text of a completion (T,) before its first end-of-turn token.

        Other control tokens remain visible: a reward must judge what the model really wrote.
        """
        kept = []
        for token in tokens.tolist():
            if token in self.end_ids:
                break
            kept.append(token)
        # Some tokenizers are configured to remove spaces before punctuation.
        return str(
            self.tokenizer.decode(
                kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def load_vocabulary(folder: str | Path, config: Qwen2VLConfig, device: str = "cpu") -> Vocabulary:
    """Load the tokenizer of a checkpoint folder, without running any code from it.

    Raises:
        InputError: the tokenizer is missing, unusable, or does not fit the model.
    """
    # Imported here because it takes seconds: an error in the config should not have to wait.
    from transformers import AutoTokenizer

    folder = Path(folder)
    remedy = "copy tokenizer.json and tokenizer_config.json"
    # If both are missing, transformers would make one up.
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{folder}: no tokenizer; {remedy}")
    for name in COMPANIONS:
        if (folder / name).exists():
            check_file(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer.get_vocab()  # some classes don't implement it
    except Exception as error:  # the tokenizers library has no exception class of its own
        raise InputError(f"{folder}: no usable tokenizer ({reason(error)}); {remedy}") from None
    allowed_V = allowed_tokens_V(tokenizer, config.vocab_size, config.vision_token_ids)
    return Vocabulary(tokenizer, _end_ids(folder, tokenizer), allowed_V.to(device))


def _end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids in generation_config.json, as in the published models, or the tokenizer's EOS id."""
    ids: Any = tokenizer.eos_token_id
    file = folder / "generation_config.json"
    if file.exists():
        fields = read_json(file, "copy or download it again")
        if not isinstance(fields, dict):
            raise InputError(f"{file}: not a JSON object; copy or download it again")
        ids = fields.get("eos_token_id", ids)
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    # Not isinstance, which would accept true as token 1.
    if not ids or not all(type(i) is int and 0 <= i < len(tokenizer) for i in ids):
        raise InputError(
            f"{folder}: no valid end-of-turn token (eos_token_id is {ids}) in "
            "generation_config.json or the tokenizer"
        )
    return ids


def allowed_tokens_V(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, forbidden_ids: Iterable[int] = ()
) -> Tensor:
    """The ids that may be sampled, bool (V,).

    Excluded are vision tokens, `forbidden_ids` (the checkpoint's own image and video tokens), and
    embedding rows that no token uses.

    Raises:
        InputError: an id of the tokenizer or of `forbidden_ids` is beyond the embedding's rows.
    """
    id_of = tokenizer.get_vocab()
    used = list(id_of.values())
    forbidden = [*forbidden_ids, *(id_of[token] for token in _VISION_TOKENS if token in id_of)]
    largest = max(used + forbidden)
    if largest >= vocab_size:
        raise InputError(
            f"{tokenizer.name_or_path}: token ids go up to {largest}, but the checkpoint's "
            f"embedding has {vocab_size} rows: use the tokenizer and config.json that belong to it"
        )
    # The published models have a few hundred more rows than tokens, with meaningless weights.
    allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
    allowed_V[used] = True
    allowed_V[forbidden] = False
    return allowed_V
