"""Encode a question as a prompt: tokens, patches and positions.

The question's text is tokenised apart from the chat template, with control tokens disabled:
"<|im_end|>" or "<|image_pad|>" in a question file stays text. Qwen's template has a control token
on either side of the text, so harmless text gives exactly the tokens of transformers'
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
"""For each image of a question, its patches (S, C) and their grid."""
_PLACEHOLDER = "(the words)"  # stands for the text while the template is rendered


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question encoded for the model; never truncated.

    Attributes:
        question: the question itself.
        tokens_P: int64 (P,), with every image expanded to its image tokens.
        patches_SC: float32 (S, C), the patches of all images in reading order.
        grids_I3: int64 (I, 3), the grid of patches of each image, (1, rows, columns).
        positions_3P: int64 (3, P), the temporal, height and width position of each token.
        features_ID: the vision tower's output, one row per image token, if it has been computed.
    """

    question: Question
    tokens_P: Tensor
    patches_SC: Tensor
    grids_I3: Tensor
    positions_3P: Tensor
    features_ID: Tensor | None = None

    def without_images(self) -> Prompt:
        """The prompt for a process that only reads about it."""
        # Not a slice, which would be sent with all the memory that it is a view of.
        no_patches = self.patches_SC.new_empty(0, self.patches_SC.shape[1])
        return replace(self, patches_SC=no_patches, features_ID=None)

    def continued(self, ids: Sequence[int]) -> Prompt:
        """The prompt followed by the beginning of a completion, for the model to continue."""
        # Not the length: an image takes as many positions as its longer side has tokens.
        next_position = int(self.positions_3P.max()) + 1
        positions_T = next_position + torch.arange(len(ids))
        return replace(
            self,
            tokens_P=torch.cat((self.tokens_P, torch.tensor(ids, dtype=torch.int64))),
            positions_3P=torch.cat((self.positions_3P, positions_T.expand(3, -1)), dim=1),
        )


class Selection(NamedTuple):
    """The usable questions in order, and why others are not usable.

    `too_long` counts the questions left out because their prompts are too long. `unreadable` has
    one error for each question that was kept although one of its images can't be used.
    """

    questions: list[Question]
    too_long: int
    unreadable: list[InputError]


@dataclass
class PromptEncoder:
    """Turns questions into prompts for one checkpoint.

    Attributes:
        tokenizer: the checkpoint's tokenizer from transformers, with its chat template.
        shape: the checkpoint's config, for its image token and patch sizes.
        min_pixels, max_pixels: limits on the area of a resized image.
        max_prompt_tokens: the longest prompt allowed, image tokens included.
        too_long: how `select` treats longer prompts, "error" or "skip".

    Raises:
        InputError: the tokenizer's chat template is missing, or has no place for image and text.
    """

    tokenizer: PreTrainedTokenizerBase
    shape: Qwen2VLConfig
    _: KW_ONLY
    min_pixels: int
    max_pixels: int
    max_prompt_tokens: int
    too_long: str = "error"

    def __post_init__(self) -> None:
        # Cached by number of images: rendering takes longer than everything else.
        self._template = cache(self._rendered)
        self._template(1)  # refuse an unusable template before anything else happens

    def encode(self, question: Question, load: LoadImage = load_image) -> Prompt:
        """Encode a whole prompt; `load` reads an image file.

        Raises:
            InputError: the prompt is too long (regardless of `too_long`), or an image can't be
                used.
        """
        return self.assemble(question, self.patchify(question, load))

    def patchify(self, question: Question, load: LoadImage = load_image) -> Patches:
        """The patches and grid of each image: the slow half of `encode`, safe in any thread."""
        sizes = self.shape.vision, self.min_pixels, self.max_pixels
        return [preprocess(load(path), *sizes) for path in question.images]

    def assemble(self, question: Question, images: Patches) -> Prompt:
        """The other half of `encode`: put text around the images that `patchify` returned.

        Only one thread at a time may use the tokenizer.
        """
        grids = [grid for _, grid in images]
        tokens_P = torch.tensor(self._tokens(question, grids))
        if len(tokens_P) > self.max_prompt_tokens:
            raise self._too_long_error(question, len(tokens_P))
        grids_I3 = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        positions_3P = mrope_positions(tokens_P, grids_I3, self.shape)
        # Start with no patches, so that a question without images gets a tensor of the right width.
        no_patches = torch.empty(0, self.shape.vision.patch_values)
        patches_SC = torch.cat([no_patches, *(patches for patches, _ in images)])
        return Prompt(question, tokens_P, patches_SC, grids_I3, positions_3P)

    def count_tokens(self, question: Question) -> int:
        """The length of the prompt, from the image files' headers alone. Raises InputError."""
        return len(self._tokens(question, self.grids(question)))

    def grids(self, question: Question) -> list[Grid]:
        """The grids that `patchify` will return, from the image files' headers alone.

        Raises InputError.
        """
        sizes = self.shape.vision, self.min_pixels, self.max_pixels
        return [fitted_grid(image_size(path), *sizes) for path in question.images]

    def select(self, questions: Sequence[Question], keep_unreadable: bool = False) -> Selection:
        """Select the questions whose prompts are not too long.

        With `keep_unreadable`, a question whose image can't be used keeps its place in the order
        and is left out at its step. So a resumed run trains on the same questions at the same
        steps, even if more images have become unreadable.

        Raises:
            InputError: a prompt is too long and `too_long` is "error"; an image can't be used and
                `keep_unreadable` is False; or no question can be used.
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
                length = 0  # so that it is kept below
            if length <= self.max_prompt_tokens:
                kept.append(question)
            elif self.too_long == "error":
                raise self._too_long_error(question, length)
            else:
                too_long += 1
        if questions and len(kept) == len(unreadable):
            raise InputError(
                f"none of the {len(questions)} prompts can be used: {too_long} are longer than "
                "max_prompt_tokens (raise it or lower max_pixels), "
                f"{len(unreadable)} have an image that can't be read"
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
        # With special tokens split, a control token in a question file is just letters.
        words = self.tokenizer(
            prompt_text(question), add_special_tokens=False, split_special_tokens=True
        )
        return [*tokens, *words.input_ids, *after]

    def _rendered(self, image_count: int) -> tuple[list[int], list[int]]:
        """The template's tokens before and after the text, with one image token per image."""
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
        except Exception as error:  # a template is a program: it can raise anything
            raise InputError(
                "the tokenizer's chat template can't be rendered or tokenised "
                f"({reason(error)}): use the template of Qwen2-VL (chat_template.jinja)"
            ) from None
        if len(sides) != 2 or sides[0].count(self.shape.image_token_id) != image_count:
            raise InputError(
                "the tokenizer's chat template does not render one image token for each image and "
                "then the text: use the template of Qwen2-VL"
            )
        return sides[0], sides[1]
