"""From a question to what the model reads.

The question's words are tokenised apart from the chat template, with control tokens switched off:
"<|im_end|>" or "<|image_pad|>" in a question file stays text. Because Qwen's template has a control
token on either side of the words, harmless ones give the very tokens of transformers'
`Qwen2VLProcessor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from common.errors import InputError, reason
from model import Qwen2VLConfig
from model.rope import mrope_positions

from .images import Grid, fitted_grid, image_size, load_image, preprocess
from .prompt import prompt_text
from .question import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LoadImage = Callable[[Path], Image]
Patches = list[tuple[Tensor, Grid]]
"""Of each image of a question: its patches (S, C) and their grid."""
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
        features_ID: the vision tower's output, one row for each image token, where the images are
            encoded already.
    """

    question: Question
    tokens_P: Tensor
    patches_SC: Tensor
    grids_I3: Tensor
    positions_3P: Tensor
    features_ID: Tensor | None = None

    def continued(self, ids: Sequence[int]) -> Prompt:
        """The prompt with the beginning of an answer behind it, for the model to go on from."""
        # Not the length: an image of many tokens takes as many positions as its longer side.
        next_position = int(self.positions_3P.max()) + 1
        positions_T = next_position + torch.arange(len(ids))
        return replace(
            self,
            tokens_P=torch.cat((self.tokens_P, torch.tensor(ids, dtype=torch.int64))),
            positions_3P=torch.cat((self.positions_3P, positions_T.expand(3, -1)), dim=1),
        )


class Selection(NamedTuple):
    """The questions that can be used, in their order; how many others have prompts that are too
    long; and, for each of those kept though an image can't be used, the error that says why.
    """

    questions: list[Question]
    too_long: int
    unreadable: list[InputError]


@dataclass
class PromptEncoder:
    """Turns questions into prompts for one checkpoint.

    Attributes:
        tokenizer: the checkpoint's, of transformers, with its chat template.
        shape: the checkpoint's config, for its image token and the sizes of its patches.
        min_pixels, max_pixels: limits of a resized image's area.
        max_prompt_tokens: the longest prompt allowed, image tokens included.
        too_long: what `select` does about a longer one, "error" or "skip".

    Raises:
        InputError: the tokenizer's chat template is missing or has no place for an image and the
            words.
    """

    tokenizer: PreTrainedTokenizerBase
    shape: Qwen2VLConfig
    _: KW_ONLY
    min_pixels: int
    max_pixels: int
    max_prompt_tokens: int
    too_long: str = "error"

    def __post_init__(self) -> None:
        # By the number of images, as rendering costs more than all the rest.
        self._template = cache(self._rendered)
        self._template(1)  # a template of no use is refused before anything else begins

    def encode(self, question: Question, load: LoadImage = load_image) -> Prompt:
        """The whole prompt; `load` reads an image file.

        Raises:
            InputError: the prompt is too long (whatever `too_long` says), or an image can't be
                used.
        """
        return self.assemble(question, self.patchify(question, load))

    def patchify(self, question: Question, load: LoadImage = load_image) -> Patches:
        """Patches and grid of each image: the slow half of `encode`, safe in any thread."""
        sizes = self.shape.vision, self.min_pixels, self.max_pixels
        return [preprocess(load(path), *sizes) for path in question.images]

    def assemble(self, question: Question, images: Patches) -> Prompt:
        """The other half of `encode`: words around the images, which are what `patchify` gave. Only
        one thread at a time may use the tokenizer.
        """
        grids = [grid for _, grid in images]
        tokens_P = torch.tensor(self._tokens(question, grids))
        if len(tokens_P) > self.max_prompt_tokens:
            raise self._too_long_error(question, len(tokens_P))
        grids_I3 = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        positions_3P = mrope_positions(tokens_P, grids_I3, self.shape)
        # None at first, as a question without images has patches of the right width too.
        no_patches = torch.empty(0, self.shape.vision.patch_values)
        patches_SC = torch.cat([no_patches, *(patches for patches, _ in images)])
        return Prompt(question, tokens_P, patches_SC, grids_I3, positions_3P)

    def count_tokens(self, question: Question) -> int:
        """Length of the prompt, by the headers of its image files alone. Raises InputError."""
        return len(self._tokens(question, self.grids(question)))

    def grids(self, question: Question) -> list[Grid]:
        """The grid that `patchify` will make of each image, by the headers of their files. Raises
        InputError.
        """
        sizes = self.shape.vision, self.min_pixels, self.max_pixels
        return [fitted_grid(image_size(path), *sizes) for path in question.images]

    def select(self, questions: Sequence[Question], keep_unreadable: bool = False) -> Selection:
        """The questions whose prompts fit.

        With `keep_unreadable` a question whose image can't be used keeps its place in the order, so
        that a resumed run, which may meet more such images, trains on the same questions at the
        same steps. It is left out when its step comes.

        Raises:
            InputError: a prompt is too long and `too_long` is "error"; an image can't be used and
                is not kept; or no question can be used.
        """
        kept: list[Question] = []
        unreadable: list[InputError] = []
        too_long = 0
        for question in questions:
            try:
                length = self.count_tokens(question)
            except InputError as error:
                if not keep_unreadable:
                    raise
                unreadable.append(error)
                length = 0  # it keeps its place below
            if length <= self.max_prompt_tokens:
                kept.append(question)
            elif self.too_long == "error":
                raise self._too_long_error(question, length)
            else:
                too_long += 1
        if questions and len(kept) == len(unreadable):
            raise InputError(
                f"none of the {len(questions)} prompts can be used: {too_long} are longer than "
                "max_prompt_tokens (raise it or lower max_pixels), and of "
                f"{len(unreadable)} an image can't be read"
            )
        return Selection(kept, too_long, unreadable)

    def _too_long_error(self, question: Question, length: int) -> InputError:
        return InputError(
            f"{question.source}: the prompt has {length} tokens, more than max_prompt_tokens = "
            f"{self.max_prompt_tokens}: raise it, lower max_pixels, or skip such questions "
            "(too_long = 'skip')"
        )

    def _tokens(self, question: Question, grids: list[Grid]) -> list[int]:
        before, after = self._template(len(grids))
        merged = self.shape.vision.spatial_merge_size**2
        lengths = [rows * columns // merged for _, rows, columns in grids]
        tokens: list[int] = []
        for token in before:
            copies = lengths.pop(0) if token == self.shape.image_token_id else 1
            tokens += [token] * copies
        # Split, so that a control token in a question file is so many letters.
        words = self.tokenizer(
            prompt_text(question), add_special_tokens=False, split_special_tokens=True
        )
        return [*tokens, *words.input_ids, *after]

    def _rendered(self, image_count: int) -> tuple[list[int], list[int]]:
        """Tokens before and after the words, with one image token for each image."""
        content = [{"type": "image"}] * image_count + [{"type": "text", "text": _PLACEHOLDER}]
        message: dict[str, Any] = {"role": "user", "content": content}
        try:
            chat = str(
                self.tokenizer.apply_chat_template(
                    [message], tokenize=False, add_generation_prompt=True
                )
            )
            sides = [
                self.tokenizer(side, add_special_tokens=False).input_ids
                for side in chat.split(_PLACEHOLDER)
            ]
        except Exception as error:  # a template is a program, which may do anything wrong
            raise InputError(
                "the tokenizer's chat template can't be rendered or tokenised "
                f"({reason(error)}): use the template of Qwen2-VL (chat_template.jinja)"
            ) from None
        if len(sides) != 2 or sides[0].count(self.shape.image_token_id) != image_count:
            raise InputError(
                "the tokenizer's chat template does not render one image token for each image and "
                "then the words: use the template of Qwen2-VL"
            )
        return sides[0], sides[1]
