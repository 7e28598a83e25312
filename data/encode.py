"""From a question to what the model reads, and from what it writes back to text.

The question's words are tokenised apart from the chat template, with control tokens switched off:
"<|im_end|>" or "<|image_pad|>" in a question file stays text. Because Qwen's template has a control
token on either side of the words, harmless ones give the very tokens of transformers'
`Qwen2VLProcessor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from common.errors import InputError
from model.rope import mrope_positions

from .images import (
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    fitted_size,
    image_size,
    load_image,
    preprocess,
)
from .prompt import prompt_text
from .question import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LoadImage = Callable[[Path], Image]
_PLACEHOLDER = "(the words)"  # holds their place while the template is rendered


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model reads it; never truncated.

    Attributes:
        question: what it was made from.
        tokens_P: int64 (P,), with every image expanded to its image tokens.
        patches_SC: float32 (S, C), the patches of all images in reading order.
        grids_I3: int64 (I, 3), each image's patches as (1, rows, columns).
        positions_3P: int64 (3, P), each token's temporal, height and width position.
        features_ID: what a vision tower made of the images, one row for each image token, if it was
            asked already.
    """

    question: Question
    tokens_P: Tensor
    patches_SC: Tensor
    grids_I3: Tensor
    positions_3P: Tensor
    features_ID: Tensor | None = None

    def continued(self, ids: Sequence[int]) -> Prompt:
        """The prompt with the beginning of an answer behind it, for the model to go on from."""
        after = int(self.positions_3P.max()) + 1 + torch.arange(len(ids))
        return replace(
            self,
            tokens_P=torch.cat((self.tokens_P, torch.tensor(ids, dtype=torch.int64))),
            positions_3P=torch.cat((self.positions_3P, after.expand(3, -1)), dim=1),
        )


class PromptEncoder:
    """Turns questions into prompts for one checkpoint.

    Args:
        tokenizer: the checkpoint's, of transformers, with its chat template.
        image_token_id: id of `<|image_pad|>`.
        min_pixels, max_pixels: limits of a resized image's area.
        max_prompt_tokens: the longest prompt allowed, image tokens included.
        too_long: what `select` does about a longer one.
        patch_size, merge_size, temporal_patch_size: of the checkpoint's vision tower.

    Raises:
        InputError: the tokenizer's chat template is missing or has no place for an image and the
            words.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_token_id: int,
        min_pixels: int,
        max_pixels: int,
        max_prompt_tokens: int,
        too_long: Literal["error", "skip"] = "error",
        patch_size: int = PATCH_SIZE,
        merge_size: int = MERGE_SIZE,
        temporal_patch_size: int = TEMPORAL_PATCH_SIZE,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.max_prompt_tokens = max_prompt_tokens
        self.too_long = too_long
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.temporal_patch_size = temporal_patch_size
        self._templates = {1: self._template(image_count=1)}

    def encode(self, question: Question, load: LoadImage = load_image) -> Prompt:
        """The whole prompt; `load` reads an image file.

        Raises:
            InputError: the prompt is too long (whatever `too_long` says), or an image can't be
                used.
        """
        return self.assemble(question, self.patchify(question, load))

    def patchify(
        self, question: Question, load: LoadImage = load_image
    ) -> list[tuple[Tensor, tuple[int, int, int]]]:
        """Patches (S, C) and grid of each image: the slow half of `encode`, which any thread may
        do.
        """
        seen = []
        for path in question.images:
            image = load(path)
            with _naming(question, path):
                seen.append(
                    preprocess(
                        image, self.min_pixels, self.max_pixels, self.patch_size, self.merge_size,
                        self.temporal_patch_size,
                    )
                )  # fmt: skip
        return seen

    def assemble(
        self, question: Question, seen: list[tuple[Tensor, tuple[int, int, int]]]
    ) -> Prompt:
        """The other half of `encode`: words around the images. One thread at a time may use the
        tokenizer.
        """
        patches = [torch.empty(0, self._patch_values()), *(patches_SC for patches_SC, _ in seen)]
        grids = [grid for _, grid in seen]
        tokens_P = torch.tensor(
            self._tokens(question, [self._image_tokens(grid) for grid in grids])
        )
        if len(tokens_P) > self.max_prompt_tokens:
            raise self._too_long_error(question, len(tokens_P))
        grids_I3 = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        positions_3P = mrope_positions(tokens_P, grids_I3, self.image_token_id, self.merge_size)
        return Prompt(question, tokens_P, torch.cat(patches), grids_I3, positions_3P)

    def count_tokens(self, question: Question) -> int:
        """Length of the prompt, from the headers of the image files: no pixel is decoded. Raises
        InputError.
        """
        return len(
            self._tokens(question, [self._image_tokens(grid) for grid in self.grids(question)])
        )

    def grids(self, question: Question) -> list[tuple[int, int, int]]:
        """The grid that `patchify` will make of each image, from the headers of their files. Raises
        InputError.
        """
        grids = []
        for path in question.images:
            width, height = image_size(path)
            with _naming(question, path):
                factor = self.patch_size * self.merge_size
                height, width = fitted_size(height, width, factor, self.min_pixels, self.max_pixels)
            grids.append((1, height // self.patch_size, width // self.patch_size))
        return grids

    def select(
        self, questions: Sequence[Question], unreadable: Callable[[InputError], None] | None = None
    ) -> tuple[list[Question], int]:
        """The questions whose prompts fit, and how many were left out as too long.

        One with an image that can't be used stays, if `unreadable` takes the error: it keeps its
        place in the order, for a resumed run that may find more such images, and is left out when
        its step comes.

        Raises:
            InputError: one is too long and `too_long` is "error"; an image can't be used and
                `unreadable` is None; or no question can be used.
        """
        fitting, too_long, bad = [], 0, 0
        for question in questions:
            try:
                length = self.count_tokens(question)
            except InputError as error:
                if unreadable is None:
                    raise
                unreadable(error)
                bad += 1
                length = 0
            if length <= self.max_prompt_tokens:
                fitting.append(question)
            elif self.too_long == "error":
                raise self._too_long_error(question, length)
            else:
                too_long += 1
        if questions and len(fitting) == bad:
            raise InputError(
                f"none of the {len(questions)} prompts can be used: {too_long} don't fit into max_prompt_tokens = "
                f"{self.max_prompt_tokens} (raise it or lower max_pixels), and of {bad} an image can't be read"
            )
        return fitting, too_long

    def _too_long_error(self, question: Question, length: int) -> InputError:
        return InputError(
            f"{question.source}: the prompt has {length} tokens, more than max_prompt_tokens = "
            f"{self.max_prompt_tokens}: raise it, lower max_pixels, or skip such questions (too_long = 'skip')"
        )

    def _patch_values(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    def _image_tokens(self, grid: tuple[int, int, int]) -> int:
        frames, rows, columns = grid
        return frames * rows * columns // self.merge_size**2

    def _tokens(self, question: Question, image_tokens: list[int]) -> list[int]:
        images = len(image_tokens)
        if images not in self._templates:  # rendering costs more than all the rest
            self._templates[images] = self._template(images)
        head, tail = self._templates[images]
        counts = iter(image_tokens)
        expanded = [
            token
            for token in head
            for _ in range(next(counts) if token == self.image_token_id else 1)
        ]
        words = self.tokenizer(
            prompt_text(question), add_special_tokens=False, split_special_tokens=True
        )
        return [*expanded, *words.input_ids, *tail]

    def _template(self, image_count: int) -> tuple[list[int], list[int]]:
        """Tokens before and after the words, with one image token for each image."""
        if self.tokenizer.chat_template is None:
            raise InputError(
                "the checkpoint's tokenizer has no chat template: add chat_template.jinja to its folder"
            )
        content = [{"type": "image"}] * image_count + [{"type": "text", "text": _PLACEHOLDER}]
        try:
            chat = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            parts = [
                self.tokenizer(part, add_special_tokens=False).input_ids
                for part in chat.split(_PLACEHOLDER)
            ]
        except Exception as error:  # raised again as InputError: a template is a program, which may do anything wrong
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"the tokenizer's chat template can't be rendered or tokenised ({reason}): use the template of Qwen2-VL"
            ) from None
        if len(parts) != 2 or parts[0].count(self.image_token_id) != image_count:
            raise InputError(
                "the tokenizer's chat template does not render one image token for each image and then the words: "
                "use the template of Qwen2-VL"
            )
        return parts[0], parts[1]


@contextmanager
def _naming(question: Question, path: Path) -> Iterator[None]:
    """Lets an error about pixels say whose they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{question.source}: {path}: {error}") from None
