"""Grouped rollouts: each prompt runs once with its images, and G completions grow from its cache.

The sampler draws from exactly the distribution that is trained: the loss applies the same
temperature and excludes the same forbidden ids, and there is no top-k or top-p. All random numbers
are drawn in advance, a block (G, T) for each (seed, step, place in the step), and turned into
tokens by inverting the cumulative distribution. So a completion does not depend on the rest of the
batch (up to rounding), and a resumed run has no generator state to restore.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from data import Prompt, Vocabulary
from model import Qwen2VL
from model.cache import GroupCache
from model.linear import arranged
from model.logprobs import masked_logits

from .rollout import PromptBatch, Rollout, collate, empty_rollout

CHECK_EVERY = 8
"""Decoding steps between checks for finished completions; each makes the host wait for the GPU."""

IDS_IN_BLOCK = 128
"""Ids per block in `inverse_cdf`: roughly the square root of the vocabulary's size."""

SHRINK_AT = 0.75
"""Finished completions leave the batch once at most this share of its rows would remain."""

SPAN_STEP = 64
"""On a GPU, the slots that attention reads and the room for prompts grow in steps of this size,
because every size has its own captured graph.
"""


def sampling_noise(
    seed: int, step: int, places: Sequence[int], group_size: int, max_new_tokens: int
) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N, G, T), for the prompts at `places` in the step."""
    blocks = []
    for place in places:
        stream = np.random.default_rng([seed, step, place])
        blocks.append(stream.random((group_size, max_new_tokens), dtype=np.float32))
    noise = np.array(blocks, dtype=np.float32)
    return torch.from_numpy(noise.reshape(-1, group_size, max_new_tokens))  # blocks may be empty


def inverse_cdf(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample o_t: the first token whose cumulative probability exceeds the noise.

    A single running sum over 150,000 ids would be slow, and in float32 it would distort the
    probabilities of the last ids. So ids are summed in blocks: a float64 running sum over the
    blocks finds the block, another over its ids finds the token. A token of probability 0 is never
    chosen, because it does not raise the running sum. `naive_inverse_cdf` is the slow twin.

    Args:
        logits: (R, V); overwritten.
        noise: (R,), uniform in [0, 1).

    Returns:
        The ids (R,) and their log-probabilities, float32 (R,).
    """
    V, size = logits.shape[1], IDS_IN_BLOCK
    highest = logits.amax(dim=-1, keepdim=True)
    odds = logits.sub_(highest).exp_()  # proportional to the probabilities
    whole = V // size * size
    masses = odds[:, :whole].unflatten(1, (-1, size)).sum(dim=-1, dtype=torch.float32)
    if whole < V:
        masses = torch.cat((masses, odds[:, whole:].sum(dim=-1, keepdim=True)), dim=-1)
    blocks = masses.double().cumsum(dim=-1)
    mass = blocks[:, -1:]
    threshold = noise.double()[:, None] * mass
    block = torch.searchsorted(blocks, threshold, right=True).clamp(max=blocks.shape[1] - 1)

    # The threshold's position in its block, as a share of the block's mass: the running sum over
    # the ids may round differently from that mass.
    share = (threshold - blocks.gather(-1, block)) / masses.gather(-1, block).double() + 1
    share = share.clamp(0, 1 - 1e-12)  # below 1, so that some id's running sum exceeds it
    ids = block * size + torch.arange(size, device=logits.device)
    in_block = odds.gather(-1, ids.clamp(max=V - 1)).masked_fill(ids >= V, 0.0)
    within = in_block.double().cumsum(dim=-1)
    place = torch.searchsorted(within, share * within[:, -1:], right=True).clamp(max=size - 1)
    chosen = ids.gather(-1, place).clamp(max=V - 1)
    probability = odds.gather(-1, chosen).double() / mass
    return chosen.squeeze(-1), probability.log().float().squeeze(-1)


def naive_inverse_cdf(logp: Tensor, noise: Tensor) -> Tensor:
    """The slow twin of `inverse_cdf`: one running sum. logp (R, V), noise (R,) -> ids (R,)."""
    cumulative = logp.double().exp().cumsum(dim=-1)
    threshold = noise.double()[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return ids.clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def sample_groups(
    model: Qwen2VL,
    vocabulary: Vocabulary,
    prompts: Sequence[Prompt],
    noise_NGT: Tensor | None,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 0,
    watch: Callable[[Tensor], None] | None = None,
) -> Rollout:
    """Sample a group o_1 ... o_G ~ pi_old(. | q) of at most T tokens each for every prompt q.

    Args:
        noise_NGT: from `sampling_noise`; its shape determines G and T. None decodes one completion
            of at most `max_new_tokens` greedily.
        temperature: divides the logits, both for sampling and in the returned log-probabilities.
        watch: called with the tokens (N, G) of every decoding step, to display them.
    """
    N, G, T = (len(prompts), 1, max_new_tokens) if noise_NGT is None else noise_NGT.shape
    if not N:  # a step has fewer prompts than there are processes
        return empty_rollout(G, model.embed.weight.device)
    batch = collate(prompts, model.embed.weight.device)
    kind = RolloutKind((N, G, T), temperature, greedy=noise_NGT is None)
    growing = growing_rows(model, vocabulary, kind, batch.tokens_NP.shape[1])
    growing.begin(model, batch, noise_NGT)
    with arranged(model.decoding_weights(), rows=N * G):
        for t in range(T):
            if watch is not None:
                watch(growing.tokens.view(N, G, T)[..., t])
            if t + 1 == T:
                break
            if (t + 1) % CHECK_EVERY == 0 and not growing.drop_finished(written=t):
                break
            growing.advance(model, t)
    return growing.rollout(prompts)


class RolloutKind(NamedTuple):
    """The settings that a rollout's buffers and graphs depend on, besides model and vocabulary."""

    shape: tuple[int, int, int]  # N, G, T
    temperature: float
    greedy: bool


class Growing:
    """The state of a rollout: R rows, an equal number for every group that is still growing.

    `tokens` and `logps` (N * G, T) collect the results of all completions, and `row_R` maps each
    row to its completion. All groups have the same number of rows because they share matrix
    products, so a group may include finished rows. Like those of the cache, the tensors are written
    in place and never replaced. Only the first `rows` entries of the tensors named _R are in use.
    The model may keep this object, so every call takes the model as an argument: storing it here
    would create a reference cycle that keeps both alive.
    """

    def __init__(
        self, model: Qwen2VL, vocabulary: Vocabulary, kind: RolloutKind, prompt_size: int
    ) -> None:
        N, G, T = kind.shape
        device = model.embed.weight.device
        self.vocabulary, self.kind = vocabulary, kind
        self.cache = GroupCache(N, prompt_size, G, T, model.embed.weight.dtype, device)
        self.ends = torch.tensor(vocabulary.end_ids, device=device)
        self.noise = torch.zeros(N * G, T, device=device)
        self.tokens = torch.zeros(N * G, T, dtype=torch.int64, device=device)
        self.logps = torch.zeros(N * G, T, device=device)
        self.row_R = torch.zeros(N * G, dtype=torch.int64, device=device)
        self.position_R = torch.zeros_like(self.row_R)
        self.done_R = torch.zeros(N * G, dtype=torch.bool, device=device)
        self.rows = N * G
        self.graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self.warmed_up: set[tuple[int, int, int]] = set()

    def fits(self, vocabulary: Vocabulary, kind: RolloutKind, prompt_size: int) -> bool:
        """Whether this state can be reused for such a rollout."""
        room = self.cache.prompt_bias.shape[-1]
        return self.vocabulary is vocabulary and self.kind == kind and prompt_size <= room

    def begin(self, model: Qwen2VL, batch: PromptBatch, noise_NGT: Tensor | None) -> None:
        """Run the prompts and choose the first tokens."""
        G = self.cache.group_size
        self.rows = len(self.tokens)
        if noise_NGT is not None:
            self.noise.copy_(noise_NGT.view_as(self.noise))
        self.tokens.fill_(self.ends[0])
        self.logps.zero_()
        self.done_R.zero_()
        self.row_R.copy_(torch.arange(self.rows))
        # The completions of a prompt continue after the largest of its three-part positions.
        after_prompt_N = batch.positions_3NP.amax(dim=(0, 2)) + 1
        self.position_R.copy_(after_prompt_N.repeat_interleave(G))
        last_ND = model.prefill(*batch.parts(), self.cache)
        self._choose(model, last_ND.repeat_interleave(G, dim=0))

    def advance(self, model: Qwen2VL, t: int) -> None:
        """Write token t of every row to the cache, and choose token t + 1.

        On a GPU, the kernel launches of a decoding step are captured in a graph, one for each
        number of rows and span, and then replayed together.
        """
        if not self.tokens.is_cuda:
            self.decode_and_choose(model, span=t + 1)
            return
        span = min((t // SPAN_STEP + 1) * SPAN_STEP, self.tokens.shape[1])
        shape = self.cache.groups, self.rows, span
        if shape not in self.warmed_up:  # libraries initialise on first use; that can't be captured
            self.warmed_up.add(shape)
            self.decode_and_choose(model, span, padded=True)
            return
        if shape not in self.graphs:
            # The graphs run one at a time, so they can share one memory pool.
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.decode_and_choose(model, span, padded=True)
            self.graphs[shape] = graph
        self.graphs[shape].replay()

    def decode_and_choose(self, model: Qwen2VL, span: int, padded: bool = False) -> None:
        """Decode one token per row and choose the next, without making the host wait.

        `span` is all that Python knows of the step, so that a captured graph serves other steps.
        """
        row_R, step = self.row_R[: self.rows], self.cache.step
        position_R = self.position_R[: self.rows] + step
        tokens_R = self.tokens[row_R, step]
        hidden_RD = model.decode(tokens_R, position_R, self.cache, span, padded)
        self._choose(model, hidden_RD)

    def _choose(self, model: Qwen2VL, hidden_RD: Tensor) -> None:
        row_R, step = self.row_R[: self.rows], self.cache.step
        allowed_V, temperature = self.vocabulary.allowed_V, self.kind.temperature
        logits_RV = masked_logits(hidden_RD, model.head_weight, allowed_V, temperature)
        if self.kind.greedy:
            logp_R, chosen_R = logits_RV.log_softmax(dim=-1).max(dim=-1)
        else:
            chosen_R, logp_R = inverse_cdf(logits_RV, self.noise[row_R, step])
        self.tokens[row_R, step] = chosen_R
        self.logps[row_R, step] = logp_R
        self.done_R[: self.rows] |= (chosen_R[:, None] == self.ends).any(dim=-1)

    def drop_finished(self, written: int) -> bool:
        """Drop finished groups and rows, if enough have finished. Returns False if all have.

        `written` slots of the cache are filled; the latest token is not in it yet.
        """
        growing = (~self.done_R[: self.rows]).view(self.cache.groups, -1).cpu()
        groups = growing.any(dim=1).nonzero()[:, 0]
        if not len(groups):
            return False
        width = int(growing.sum(dim=1).max())
        if len(groups) * width <= SHRINK_AT * growing.numel():
            # Growing rows come first, in order; finished rows fill the group up to `width`.
            members = growing[groups].int().argsort(dim=1, descending=True, stable=True)[:, :width]
            rows = (groups[:, None] * growing.shape[1] + members).flatten().to(self.row_R.device)
            self.cache.keep(groups.to(rows.device), rows, written)
            for buffer in (self.row_R, self.position_R, self.done_R):
                buffer[: len(rows)] = buffer[rows]
            self.rows = len(rows)
        return True

    def rollout(self, prompts: Sequence[Prompt]) -> Rollout:
        """The sampled completions, copied from the buffers, which the next rollout may reuse.

        Raises:
            InputError: the model's probabilities are not finite.
        """
        N, G, T = self.kind.shape
        tokens, logps = self.tokens.view(N, G, T), self.logps.view(N, G, T)
        ends = torch.isin(tokens, self.ends)
        mask = ends.cumsum(dim=-1) - ends.long() == 0  # no end of turn before the token
        if not logps[mask].isfinite().all():
            raise InputError(
                "the model's probabilities are not finite: its weights are damaged (copy them "
                "again), or training has diverged (start again in another run_dir with a lower "
                "learning_rate)"
            )
        longest = int(mask.sum(-1).max())
        mask, ends = mask[..., :longest], ends[..., :longest]
        # Pad behind each completion: tokens with ends of turn, log-probabilities with zeros.
        tokens = tokens[..., :longest].masked_fill(~mask, self.vocabulary.end_ids[0])
        logps = logps[..., :longest].masked_fill(~mask, 0.0)
        texts = []
        for group, lengths in zip(tokens.cpu(), mask.sum(-1).tolist(), strict=True):
            rows = zip(group, lengths, strict=True)
            texts.append([self.vocabulary.decode(row[:length]) for row, length in rows])
        return Rollout(prompts, tokens, mask, logps, ends.any(-1), texts)


def growing_rows(
    model: Qwen2VL, vocabulary: Vocabulary, kind: RolloutKind, prompt_size: int
) -> Growing:
    """The state for a rollout. On a GPU the model keeps the latest one, with its graphs."""
    kept = model.rollout_state
    if kept is not None and kept.fits(vocabulary, kind, prompt_size):
        return kept
    model.rollout_state = None  # free its memory before the new state is allocated
    if not model.embed.weight.is_cuda:
        return Growing(model, vocabulary, kind, prompt_size)
    prompt_size = -(-prompt_size // SPAN_STEP) * SPAN_STEP  # room for slightly longer prompts
    model.rollout_state = Growing(model, vocabulary, kind, prompt_size)
    return model.rollout_state
