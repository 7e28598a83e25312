"""The data of a step: its batch of prompts, the rollout of their groups, and its micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.errors import InputError
from data import Prompt, Vocabulary
from model import Qwen2VL, token_logprobs


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """N prompts, right-padded to P tokens, and their images in reading order.

    `images` are patches (S, C) with their grids. If `grids_I3` is None, they are the features that
    the vision tower has already computed, one row per image token.
    """

    tokens_NP: Tensor
    positions_3NP: Tensor
    lengths_N: Tensor
    images: Tensor | None
    grids_I3: Tensor | None

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The fields, in the order in which the model's methods take them."""
        return self.tokens_NP, self.positions_3NP, self.lengths_N, self.images, self.grids_I3


def collate(prompts: Sequence[Prompt], device: str | torch.device = "cpu") -> PromptBatch:
    """Pad the prompts to a common length and move them to the device."""
    lengths = [len(prompt.tokens_P) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    positions = torch.zeros(3, len(prompts), max(lengths), dtype=torch.int64)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens[row, :length] = prompt.tokens_P
        positions[:, row, :length] = prompt.positions_3P

    images, grids = None, None
    with_images = [prompt for prompt in prompts if len(prompt.grids_I3)]
    features = [prompt.features_ID for prompt in with_images if prompt.features_ID is not None]
    if features:  # all prompts have them, or none
        images = torch.cat(features).to(device)
    elif with_images:
        images = torch.cat([prompt.patches_SC for prompt in with_images]).to(device)
        # Grids stay on the CPU: they only decide shapes.
        grids = torch.cat([prompt.grids_I3 for prompt in with_images])
    lengths_N = torch.tensor(lengths, device=device)
    return PromptBatch(tokens.to(device), positions.to(device), lengths_N, images, grids)


@torch.no_grad()
def with_image_features(model: Qwen2VL, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, with the vision tower's features of their images added.

    For a frozen tower: its features are computed once and shared by policy, reference and all
    passes of a step.
    """
    device = model.embed.weight.device
    encoded = []
    for prompt in prompts:
        if len(prompt.grids_I3):
            features_ID = model.encode_images(prompt.patches_SC.to(device), prompt.grids_I3)
            prompt = replace(prompt, features_ID=features_ID)
        encoded.append(prompt)
    return encoded


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some of a rollout's groups, for one forward and backward pass.

    `groups` is their slice of the N groups; T is the length of their longest completion.
    """

    groups: slice
    prompts: PromptBatch
    tokens_NGT: Tensor
    mask_NGT: Tensor

    def cut(self, x_NGT: Tensor) -> Tensor:
        """This micro-batch's slice of a tensor of the whole step."""
        return x_NGT[self.groups, :, : self.mask_NGT.shape[-1]]


_TENSORS = ("tokens_NGT", "mask_NGT", "logp_NGT", "ended_NG")


@dataclass(frozen=True, slots=True)
class Rollout:
    """G sampled completions o_1 ... o_G of each of N prompts.

    T is the length of the longest completion, not the limit. `mask_NGT` is True up to and including
    the first end of turn. `logp_NGT` is log pi_old(o_t | q, o_<t), under the policy that sampled.
    `ended_NG` is False for truncated completions. `texts` leave out the end of turn. `own` are the
    groups that this process trains, by default all.
    """

    prompts: Sequence[Prompt]
    tokens_NGT: Tensor
    mask_NGT: Tensor
    logp_NGT: Tensor
    ended_NG: Tensor
    texts: list[list[str]]
    own: slice = field(default_factory=lambda: slice(None))

    def to(self, device: str | torch.device) -> "Rollout":
        """The same rollout with its tensors on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)

    def trained_mask(self, mask_truncated: bool) -> Tensor:
        """Bool (N, G, T): the tokens to train on; of truncated completions none, if so asked."""
        if mask_truncated:
            return self.mask_NGT & self.ended_NG[..., None]
        return self.mask_NGT

    def select(self, groups: Sequence[int]) -> "Rollout":
        """The rollout of these groups alone, given in ascending order."""
        own = range(len(self.prompts))[self.own]
        begin = sum(n < own.start for n in groups)
        return Rollout(
            [self.prompts[n] for n in groups],
            self.tokens_NGT[groups],
            self.mask_NGT[groups],
            self.logp_NGT[groups],
            self.ended_NG[groups],
            [self.texts[n] for n in groups],
            slice(begin, begin + sum(n in own for n in groups)),
        )

    def micro_batches(self, tokens_each: int) -> Iterator[MicroBatch]:
        """Whole own groups in order, as many at a time as `tokens_each` allows, at least one."""
        longest_N = self.mask_NGT.sum(-1).amax(-1).tolist()
        for groups in self._slices(tokens_each):
            longest = max(longest_N[groups])
            yield MicroBatch(
                groups,
                collate(self.prompts[groups], self.tokens_NGT.device),
                self.tokens_NGT[groups, :, :longest],
                self.mask_NGT[groups, :, :longest],
            )

    def micro_batch_count(self, tokens_each: int) -> int:
        """How many `micro_batches` there are."""
        return len(self._slices(tokens_each))

    def smaller_micro_batches(self, tokens_each: int) -> int:
        """The budget, halved until it splits the rollout differently.

        Raises:
            InputError: every micro-batch holds a single group already.
        """
        slices = self._slices(tokens_each)
        if len(slices) == len(self.prompts[self.own]):
            raise InputError(
                "out of memory with a single group in a micro-batch; set activation_checkpointing "
                "or offload_optimizer, or start again in another run_dir with a smaller "
                "group_size, max_new_tokens or max_pixels"
            )
        while self._slices(tokens_each) == slices:
            tokens_each //= 2
        return tokens_each

    def _slices(self, tokens_each: int) -> list[slice]:
        begin, sizes = self.own.start or 0, [len(prompt.tokens_P) for prompt in self.prompts]
        longest_N = self.mask_NGT.sum(-1).amax(-1).tolist()
        G = self.mask_NGT.shape[1]
        slices = micro_batch_slices(sizes[self.own], longest_N[self.own], G, tokens_each)
        return [slice(begin + one.start, begin + one.stop) for one in slices]


def empty_rollout(group_size: int, device: str | torch.device) -> Rollout:
    """A rollout of no groups, for a process that has no share in a step."""
    tokens_NGT = torch.zeros(0, group_size, 1, dtype=torch.int64, device=device)
    logp_NGT = torch.zeros(tokens_NGT.shape, device=device)
    ended_NG = tokens_NGT[..., 0].bool()
    return Rollout([], tokens_NGT, tokens_NGT.bool(), logp_NGT, ended_NG, [])


def informative_groups(rewards_NG: Tensor, count: int) -> list[int]:
    """Dynamic sampling (DAPO, arXiv 2503.14476, equation 11): which `count` groups to train on.

    The first whose rewards differ. If they are too few, the first of the others fill up, from whose
    advantages nothing is learned but a length penalty, if there is one. (DAPO samples more
    questions instead, until there are enough.) With no spare group, all, in their order.
    """
    equal_N = (rewards_NG.amax(-1) == rewards_NG.amin(-1)).tolist()
    by_use = sorted(range(len(equal_N)), key=equal_N.__getitem__)  # stable: the order is kept
    return sorted(by_use[:count])


def micro_batch_slices(
    prompt_sizes: Sequence[int], longest_N: Sequence[int], group_size: int, tokens_each: int
) -> list[slice]:
    """Split the groups, given the size of each one's prompt and longest completion.

    `tokens_each` limits the size with padding, because attention computes padding too.
    """
    slices, start = [], 0
    for stop in range(1, len(prompt_sizes) + 1):
        if stop < len(prompt_sizes):
            width = max(prompt_sizes[start : stop + 1])
            width += group_size * max(longest_N[start : stop + 1])
            if (stop + 1 - start) * width <= tokens_each:
                continue  # the next group fits too
        slices.append(slice(start, stop))
        start = stop
    return slices


def written_rollout(
    vocabulary: Vocabulary,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    device: str | torch.device,
) -> Rollout:
    """A rollout of given texts, each followed by an end of turn; `logp_NGT` is 0."""
    if not prompts:
        return empty_rollout(1, device)
    end = vocabulary.end_ids[0]
    ids = [[[*vocabulary.encode(text), end] for text in group] for group in texts]
    tokens_NGT, mask_NGT = padded(ids, end, device)
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
    """Pad groups of completions, given as ids: tokens (N, G, T) and their mask."""
    group_size = max(len(group) for group in ids)
    longest = max(len(row) for group in ids for row in group)
    tokens_NGT = torch.full((len(ids), group_size, longest), fill)
    mask_NGT = torch.zeros(tokens_NGT.shape, dtype=torch.bool)
    for n, group in enumerate(ids):
        for g, row in enumerate(group):
            tokens_NGT[n, g, : len(row)] = torch.tensor(row)
            mask_NGT[n, g, : len(row)] = True
    return tokens_NGT.to(device), mask_NGT.to(device)


def completion_logprobs(
    model: Qwen2VL, batch: MicroBatch, allowed_V: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_<t) of every completion token, and the entropy of pi(. | q, o_<t).

    Both are (N, G, T), and 0 outside the mask. Images and prompt run once per group, and only the
    states that predict completion tokens reach the head. Policy and reference share this function.
    """
    tokens_NGT, mask_NGT = batch.tokens_NGT, batch.mask_NGT
    hidden_MD = model.completion_hidden(*batch.prompts.parts(), tokens_NGT, mask_NGT)
    logp_M, entropy_M = token_logprobs(
        hidden_MD, model.head_weight, tokens_NGT[mask_NGT], allowed_V, temperature
    )
    empty = torch.zeros(mask_NGT.shape, device=logp_M.device)
    return empty.masked_scatter(mask_NGT, logp_M), empty.masked_scatter(mask_NGT, entropy_M)
