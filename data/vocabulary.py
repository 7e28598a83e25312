"""The tokens of a model: its tokenizer, which ids end a completion, and which may be sampled at
all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import InputError
from common.files import check_file, read_json
from model import Qwen2VLConfig
from model.weights import COMPANIONS

_VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`end_ids` end a completion; `allowed_V` is False for image tokens and for embedding rows that
    no token uses.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    allowed_V: Tensor

    def encode(self, completion: str) -> list[int]:
        """A completion's ids, without an end of turn; control tokens written in the text stay
        text.
        """
        return self.tokenizer(
            completion, add_special_tokens=False, split_special_tokens=True
        ).input_ids

    def decode(self, tokens: Tensor) -> str:
        """A completion's ids (T,) -> its text, without the end-of-turn; other special tokens stay
        visible.
        """
        return decode_completion(self.tokenizer, tokens, self.end_ids)


def load_vocabulary(folder: str | Path, config: Qwen2VLConfig, device: str = "cpu") -> Vocabulary:
    """Read the tokenizer of a checkpoint folder, and run no code that lies there.

    Raises:
        InputError: the folder has no tokenizer that can be used, or one that does not fit the
            model.
    """
    folder = Path(folder)
    if not any(
        (folder / name).exists() for name in ("tokenizer.json", "vocab.json")
    ):  # transformers would invent one
        raise InputError(f"{folder}: no tokenizer; copy tokenizer.json and tokenizer_config.json")
    try:
        for file in (folder / name for name in COMPANIONS):
            if file.exists():
                check_file(file)
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        size = len(tokenizer)
    except InputError:
        raise
    except Exception as error:  # raised again as InputError: the tokenizers library has no class of its own for errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{folder}: no usable tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json"
        ) from None
    if size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {size} tokens, but the model only {config.vocab_size} rows"
        )
    seen_only = (
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    )
    return Vocabulary(
        tokenizer,
        _end_ids(folder, tokenizer),
        allowed_tokens_V(tokenizer, config.vocab_size, seen_only).to(device),
    )


def _end_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """As generation_config.json says, the published models' way; else the tokenizer's own
    end-of-sequence token.
    """
    ids: Any = tokenizer.eos_token_id
    file = folder / "generation_config.json"
    if file.exists():
        raw = read_json(file, "copy or download it again")
        if not isinstance(raw, dict):
            raise InputError(f"{file}: no JSON object; copy or download it again")
        ids = raw.get("eos_token_id", ids)
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    if not ids or not all(type(i) is int and 0 <= i < len(tokenizer) for i in ids):
        raise InputError(
            f"{folder}: no valid end-of-turn token (eos_token_id is {ids}) in generation_config.json or the tokenizer"
        )
    return ids


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], end_ids: Iterable[int]
) -> str:
    """The text of a completion up to, and without, the first end-of-turn token.

    Other control tokens are shown, not hidden: a reward must see what was really written.
    """
    ends, kept = set(end_ids), []
    for token in map(int, tokens):
        if token in ends:
            break
        kept.append(token)
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def allowed_tokens_V(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, forbidden_ids: Iterable[int] = ()
) -> Tensor:
    """bool (V,): which ids may be sampled.

    Not those of vision tokens, not the `forbidden_ids` (the checkpoint's own image and video
    tokens), and not rows of the embedding that no token uses.

    Raises:
        InputError: an id of the tokenizer, or one of `forbidden_ids`, lies beyond the embedding's
            rows.
    """
    vocabulary = tokenizer.get_vocab()
    for whose, ids in (
        ("the tokenizer's", list(vocabulary.values())),
        ("config.json's", list(forbidden_ids)),
    ):
        if max(ids, default=0) >= vocab_size:
            raise InputError(
                f"{whose} token ids go up to {max(ids)}, but the checkpoint has {vocab_size} rows of embedding: use "
                "the files that belong to it"
            )
    allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
    allowed_V[list(vocabulary.values())] = True
    allowed_V[[vocabulary[token] for token in _VISION_TOKENS if token in vocabulary]] = False
    allowed_V[list(forbidden_ids)] = False
    return allowed_V
