"""What a step works on: prompts side by side, the rollout of their groups, and its division into
micro-batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from data import Prompt, Vocabulary
from model import Qwen2VL, token_logprobs


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """N prompts, right-padded to P tokens, and their images in reading order.

    `images` are patches (S, C) with their grids, or, if `grids_I3` is None, what the vision tower
    made of them.
    """

    tokens_NP: Tensor
    positions_3NP: Tensor
    lengths_N: Tensor
    images: Tensor | None
    grids_I3: Tensor | None

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order in which the model's methods take them."""
        return self.tokens_NP, self.positions_3NP, self.lengths_N, self.images, self.grids_I3


def collate(prompts: Sequence[Prompt], device: str | torch.device = "cpu") -> PromptBatch:
    """Pad prompts to one length and move them to the device. Grids stay on the CPU: they only
    decide shapes.
    """
    lengths = [len(prompt.tokens_P) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    positions = torch.zeros(3, len(prompts), max(lengths), dtype=torch.int64)
    for row, (prompt, length) in enumerate(zip(prompts, lengths)):
        tokens[row, :length] = prompt.tokens_P
        positions[:, row, :length] = prompt.positions_3P
    shown = [prompt for prompt in prompts if len(prompt.grids_I3)]
    seen = bool(shown) and shown[0].features_ID is not None
    images = [prompt.features_ID if seen else prompt.patches_SC for prompt in shown]
    return PromptBatch(
        tokens_NP=tokens.to(device),
        positions_3NP=positions.to(device),
        lengths_N=torch.tensor(lengths, device=device),
        images=torch.cat(images).to(device) if shown else None,
        grids_I3=torch.cat([prompt.grids_I3 for prompt in shown]) if shown and not seen else None,
    )


MicroBatch = tuple[slice, PromptBatch, Tensor, Tensor]
"""Which of the N groups these are, their prompts, tokens and mask."""


@torch.no_grad()
def with_image_features(model: Qwen2VL, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with what the model's vision tower makes of their images, for models that share
    that tower.
    """
    device = model.embed.weight.device
    return [
        replace(
            prompt, features_ID=model.encode_images(prompt.patches_SC.to(device), prompt.grids_I3)
        )
        if len(prompt.grids_I3)
        else prompt
        for prompt in prompts
    ]


@dataclass(frozen=True, slots=True)
class Rollout:
    """G completions of each of N prompts, as sampled.

    `mask_NGT` is true up to and including the first end-of-turn; `logp_NGT` is the log-probability
    under the policy that sampled; `ended_NG` is false for completions that the length limit cut;
    `texts` have no end-of-turn.
    """

    prompts: Sequence[Prompt]
    tokens_NGT: Tensor
    mask_NGT: Tensor
    logp_NGT: Tensor
    ended_NG: Tensor
    texts: list[list[str]]

    def micro_batches(self, tokens_each: int) -> Iterator[MicroBatch]:
        """Whole groups in their order, each part as large as `tokens_each` allows, but never less
        than one group.

        What counts is the size with padding, as attention sees it. T is cut to the longest
        completion among them; the caller cuts what it holds by `mask.shape[-1]`.
        """
        longest_N = self.mask_NGT.sum(-1).amax(-1).tolist()
        for groups in self._parts(tokens_each):
            longest = max(longest_N[groups])
            prompts = collate(self.prompts[groups], self.tokens_NGT.device)
            yield (
                groups,
                prompts,
                self.tokens_NGT[groups, :, :longest],
                self.mask_NGT[groups, :, :longest],
            )

    def smaller_micro_batches(self, tokens_each: int) -> int:
        """The budget, halved until it makes other micro-batches. InputError if each holds one group
        already.
        """
        parts = self._parts(tokens_each)
        if len(parts) == len(self.prompts):
            raise InputError(
                "out of memory with a single group in a micro-batch; set activation_checkpointing or offload_optimizer, or "
                "begin anew in another run_dir with a smaller group_size, max_new_tokens or max_pixels"
            )
        while self._parts(tokens_each) == parts:
            tokens_each //= 2
        return tokens_each

    def _parts(self, tokens_each: int) -> list[slice]:
        sizes = [len(prompt.tokens_P) for prompt in self.prompts]
        return micro_batch_slices(
            sizes, self.mask_NGT.sum(-1).amax(-1).tolist(), self.mask_NGT.shape[1], tokens_each
        )


def micro_batch_slices(
    prompt_sizes: Sequence[int], longest_N: Sequence[int], group_size: int, tokens_each: int
) -> list[slice]:
    """`Rollout.micro_batches` as places, from the size of each group's prompt and of its longest
    completion.
    """

    def tokens_of(start: int, stop: int) -> int:
        return (stop - start) * (
            max(prompt_sizes[start:stop]) + group_size * max(longest_N[start:stop])
        )

    parts, start, N = [], 0, len(prompt_sizes)
    while start < N:
        stop = start + 1
        while stop < N and tokens_of(start, stop + 1) <= tokens_each:
            stop += 1
        parts.append(slice(start, stop))
        start = stop
    return parts


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step sampled, how it was judged, what the loss compared it with, and the update's
    statistics.

    A verdict has `rule`, `score` and `why`. `old_NGT` is None with one update per rollout,
    `ref_NGT` with beta 0.
    """

    rollout: Rollout
    verdicts_NGR: Sequence[Sequence[Sequence[Any]]]
    rewards_NG: Tensor
    advantages_NG: Tensor
    old_NGT: Tensor | None
    ref_NGT: Tensor | None
    stats: dict[str, Any]

    @property
    def judged(self) -> dict[str, Tensor]:
        """What the loss took beside the completions themselves, by name."""
        tensors = {
            name: getattr(self, name)
            for name in ("rewards_NG", "advantages_NG", "old_NGT", "ref_NGT")
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def written_rollout(
    vocabulary: Vocabulary,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    device: str | torch.device,
) -> Rollout:
    """A rollout of completions that are given and not sampled, each closed by the end of turn;
    `logp_NGT` is 0.
    """
    ids = [[[*vocabulary.encode(text), vocabulary.end_ids[0]] for text in group] for group in texts]
    tokens_NGT, mask_NGT = padded(ids, vocabulary.end_ids[0], device)
    return Rollout(
        prompts=prompts,
        tokens_NGT=tokens_NGT,
        mask_NGT=mask_NGT,
        logp_NGT=torch.zeros(mask_NGT.shape, device=device),
        ended_NG=torch.ones(mask_NGT.shape[:2], dtype=torch.bool, device=device),
        texts=[list(group) for group in texts],
    )


def padded(
    ids: Sequence[Sequence[Sequence[int]]], fill: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """Groups of completions, as ids -> tokens (N, G, T) and mask; groups and completions may differ
    in size.
    """
    shape = len(ids), max(map(len, ids)), max(len(row) for group in ids for row in group)
    tokens_NGT, mask_NGT = torch.full(shape, fill), torch.zeros(shape, dtype=torch.bool)
    for n, group in enumerate(ids):
        for g, row in enumerate(group):
            tokens_NGT[n, g, : len(row)] = torch.tensor(row)
            mask_NGT[n, g, : len(row)] = True
    return tokens_NGT.to(device), mask_NGT.to(device)


def completion_logprobs(
    model: Qwen2VL,
    prompts: PromptBatch,
    tokens_NGT: Tensor,
    mask_NGT: Tensor,
    allowed_V: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """log pi of every completion token (N, G, T), and the entropy there; both 0 outside the mask.

    Image and prompt run once per group; only real tokens meet the head. Policy and reference share
    this function.
    """
    hidden = model.completion_hidden(*prompts.parts(), tokens_NGT, mask_NGT)
    logp, entropy = token_logprobs(
        hidden, model.head_weight, tokens_NGT[mask_NGT], allowed_V, temperature
    )
    empty = torch.zeros(mask_NGT.shape, device=logp.device)
    return empty.masked_scatter(mask_NGT, logp), empty.masked_scatter(mask_NGT, entropy)


@torch.no_grad()
def rollout_logprobs(
    model: Qwen2VL,
    rollout: Rollout,
    parts: Iterable[MicroBatch],
    allowed_V: Tensor,
    temperature: float,
) -> Tensor:
    """log pi (N, G, T) of a whole rollout, given in micro-batches, under a model that is not being
    trained; 0 outside the mask.
    """
    logp_NGT = torch.zeros_like(rollout.logp_NGT)
    for groups, prompts, tokens, mask in parts:
        logp, _ = completion_logprobs(model, prompts, tokens, mask, allowed_V, temperature)
        logp_NGT[groups, :, : mask.shape[-1]] = logp
    return logp_NGT
