"""Grouped rollouts: every prompt, with its image, is run once; its G completions grow from the one
cache.

What is sampled is exactly the distribution that is trained: the temperature, and the ids that can't
be sampled, are in the loss's normaliser too, and there is no top-k or top-p. Randomness is data:
one number per (seed, step, prompt, sample, position), drawn up front and turned into a token
through the inverse of the cumulative distribution. So a completion depends (up to rounding) neither
on what else is in the batch nor on how many processes share the work, and a resumed run needs no
generator's state.
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

from .rollout import PromptBatch, Rollout, collate

ASK_EVERY = 8
"""Decoding steps between two looks at which completions have ended: each makes the host wait for
the device.
"""

IDS_IN_BLOCK = 128
"""Ids that are summed before the choice among them begins: about the root of a vocabulary."""

SHRINK_AT = 0.75
"""Finished completions leave the batch when no more than this share of its rows would stay."""

SPAN_STEP = 64
"""On a GPU, attention looks at so many slots more at a time, and prompts have room to such sizes:
every size has its own captured graph.
"""


def sampling_noise(
    seed: int, step: int, prompts: Sequence[int], group_size: int, max_new_tokens: int
) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N, G, T); `prompts` are places in the step, over all
    processes.
    """
    shape = (group_size, max_new_tokens)
    streams = (np.random.default_rng([seed, step, place]) for place in prompts)
    return torch.from_numpy(
        np.stack([stream.random(shape, dtype=np.float32) for stream in streams])
    )


def inverse_cdf(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds the noise: of logits (R, V) and noise
    (R,).

    One running sum over 150,000 ids would be slow, and in float32 would shift the chances of the
    last ones. Here ids are summed in blocks, a float64 running sum over the blocks' masses finds
    the block, and one over its ids the token. A token of probability 0 is never chosen, because it
    does not raise its running sum. `naive_inverse_cdf` is the twin.

    Returns:
        The ids (R,), and their log-probabilities, float32 (R,). `logits` are overwritten.
    """
    R, V = logits.shape
    highest = logits.amax(dim=-1, keepdim=True)
    odds = logits.sub_(highest).exp_()  # proportional to the probabilities
    size = IDS_IN_BLOCK
    whole = V // size * size
    masses = odds[:, :whole].view(R, -1, size).sum(dim=-1, dtype=torch.float32)
    if whole < V:
        masses = torch.cat((masses, odds[:, whole:].sum(dim=-1, keepdim=True)), dim=-1)
    blocks = masses.double().cumsum(dim=-1)
    mass = blocks[:, -1:]
    threshold = noise.double()[:, None] * mass
    block = torch.searchsorted(blocks, threshold, right=True).clamp(max=blocks.shape[1] - 1)
    # How far into its block the threshold lies, as a share: the block's own running sum may round
    # differently.
    share = (threshold - blocks.gather(-1, block)) / masses.gather(-1, block).double() + 1
    ids = block * size + torch.arange(size, device=logits.device)
    within = (
        odds.gather(-1, ids.clamp(max=V - 1)).masked_fill(ids >= V, 0.0).double().cumsum(dim=-1)
    )
    share = share.clamp(0, 1 - 1e-12)  # below 1, so that some id's running sum exceeds it
    place = torch.searchsorted(within, share * within[:, -1:], right=True).clamp(max=size - 1)
    chosen = ids.gather(-1, place).clamp(max=V - 1)
    return chosen.squeeze(-1), (odds.gather(-1, chosen).double() / mass).log().float().squeeze(-1)


def naive_inverse_cdf(logp: Tensor, noise: Tensor) -> Tensor:
    """The twin of `inverse_cdf`: one running sum over all ids, logp (R, V), noise (R,) -> ids
    (R,).
    """
    cumulative = logp.double().exp().cumsum(dim=-1)
    threshold = noise.double()[:, None] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, threshold, right=True)
        .squeeze(-1)
        .clamp(max=logp.shape[-1] - 1)
    )


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
    """Sample G completions of at most T tokens for each prompt.

    Args:
        noise_NGT: from `sampling_noise`; its shape says G and T. None decodes one completion of at
            most `max_new_tokens` greedily.
        temperature: divides the logits, in sampling and in the log-probabilities returned.
        watch: called with each step's tokens (N, G) as they are chosen, for showing them.
    """
    N, G, T = shape = (len(prompts), 1, max_new_tokens) if noise_NGT is None else noise_NGT.shape
    batch = collate(prompts, model.embed.weight.device)
    kind = RolloutKind(shape, temperature, greedy=noise_NGT is None)
    growing = growing_rows(model, vocabulary, kind, batch.tokens_NP.shape[1])
    growing.begin(model, batch, noise_NGT)
    with arranged(model.decoding_weights(), rows=N * G):
        for t in range(T):
            if watch is not None:
                watch(growing.tokens.view(shape)[..., t])
            if t + 1 == T:
                break
            if (t + 1) % ASK_EVERY == 0 and not growing.drop_finished(written=t):
                break
            growing.advance(model, t)

    tokens, logps = growing.tokens.view(shape), growing.logps.view(shape)
    ends = torch.isin(tokens, growing.ends)
    mask = ends.cumsum(dim=-1) - ends.long() == 0  # no end before it
    if not bool(logps[mask].isfinite().all()):
        raise InputError(
            "the model's probabilities are not finite: its weights are damaged (copy them again), or training has diverged "
            "(begin anew in another run_dir with a lower learning_rate)"
        )
    # Out of the buffers, which the next rollout may use again; behind a completion there are ends
    # and zeros.
    tokens, logps = tokens.masked_fill(~mask, vocabulary.end_ids[0]), logps.masked_fill(~mask, 0.0)
    kept = int(mask.sum(-1).max())
    tokens, mask, logps, ended = (
        tokens[..., :kept],
        mask[..., :kept],
        logps[..., :kept],
        ends[..., :kept].any(-1),
    )
    lengths, rows = mask.sum(-1).tolist(), tokens.cpu()
    texts = [[vocabulary.decode(rows[n, g, : lengths[n][g]]) for g in range(G)] for n in range(N)]
    return Rollout(prompts, tokens, mask, logps, ended, texts)


class RolloutKind(NamedTuple):
    """What decides the buffers and the graphs of a rollout, beside its model and vocabulary."""

    shape: tuple[int, int, int]  # N, G, T
    temperature: float
    greedy: bool


class Growing:
    """The completions that are still growing: R rows, as many of each group that is left, and what
    they have so far.

    Results lie in `tokens` and `logps` (N * G, T) of all completions; `row_R` says which of them
    each row is. Beside rows that grow, a group may hold some that have ended: groups are kept
    equally wide, since they share products. Like the cache's, its tensors are written in place,
    never replaced; of those named _R the first `rows` count. The model, which may keep this object,
    is given to every call and not kept here: a cycle would outlive both.
    """

    def __init__(
        self,
        model: Qwen2VL,
        vocabulary: Vocabulary,
        kind: RolloutKind,
        prompt_size: int,
    ) -> None:
        (N, G, T), self.temperature, self.greedy = kind
        self.vocabulary, self.allowed_V, self.kind = vocabulary, vocabulary.allowed_V, kind
        device = model.embed.weight.device
        self.cache = GroupCache(N, prompt_size, G, T, model.embed.weight.dtype, device)
        self.ends = torch.tensor(vocabulary.end_ids, device=device)
        self.noise = torch.zeros(N * G, T, device=device)
        self.tokens = torch.zeros(N * G, T, dtype=torch.int64, device=device)
        self.logps = torch.zeros(N * G, T, device=device)
        self.row_R, self.position_R = (
            torch.zeros(N * G, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.done_R = torch.zeros(N * G, dtype=torch.bool, device=device)
        self.graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph | None] = {}

    def holds(self, prompt_size: int) -> bool:
        """Whether prompts of that length fit."""
        return prompt_size <= self.cache.prompt_bias.shape[-1]

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
        after_prompt_N = (
            batch.positions_3NP.amax(dim=(0, 2)) + 1
        )  # where all completions of a prompt go on
        self.position_R.copy_(after_prompt_N.repeat_interleave(G))
        last_ND = model.prefill(*batch.parts(), self.cache)
        self._choose(model, last_ND.repeat_interleave(G, dim=0))

    def advance(self, model: Qwen2VL, t: int) -> None:
        """Token t of every row goes into the cache, and token t + 1 is chosen.

        On a GPU a step's launches are captured once for each number of rows and span, and then
        replayed together.
        """
        if not self.tokens.is_cuda:
            return self.decode_and_choose(model, span=t + 1)
        span = min((t // SPAN_STEP + 1) * SPAN_STEP, self.tokens.shape[1])
        shape = self.cache.groups, self.rows, span
        if shape not in self.graphs:
            self.graphs[shape] = None
            return self.decode_and_choose(
                model, span, padded=True
            )  # the libraries' warm-up, which can't be captured
        if self.graphs[shape] is None:
            pool = next((graph.pool() for graph in self.graphs.values() if graph is not None), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):  # one pool: they run one at a time
                self.decode_and_choose(model, span, padded=True)
            self.graphs[shape] = graph
        self.graphs[shape].replay()

    def decode_and_choose(self, model: Qwen2VL, span: int, padded: bool = False) -> None:
        """The device's part of a step: no host in it, and nothing that depends on which step it is
        but `span`.
        """
        row_R, step = self.row_R[: self.rows], self.cache.step
        position_R = self.position_R[: self.rows] + step
        hidden_RD = model.decode(self.tokens[row_R, step], position_R, self.cache, span, padded)
        self._choose(model, hidden_RD)

    def _choose(self, model: Qwen2VL, hidden_RD: Tensor) -> None:
        row_R, step = self.row_R[: self.rows], self.cache.step
        logits_RV = masked_logits(hidden_RD, model.head_weight, self.allowed_V, self.temperature)
        if self.greedy:
            logp_R, chosen_R = logits_RV.log_softmax(dim=-1).max(dim=-1)
        else:
            chosen_R, logp_R = inverse_cdf(logits_RV, self.noise[row_R, step])
        self.tokens[row_R, step] = chosen_R
        self.logps[row_R, step] = logp_R
        self.done_R[: self.rows] |= (chosen_R[:, None] == self.ends).any(dim=-1)

    def drop_finished(self, written: int) -> bool:
        """Let groups and rows go that have ended, where enough have. False if all have.

        `written` slots of the cache are filled: the token chosen last is not in it yet.
        """
        growing = (~self.done_R[: self.rows]).view(self.cache.groups, -1).cpu()
        groups = growing.any(dim=1).nonzero()[:, 0]
        if not len(groups):
            return False
        width = int(growing.sum(dim=1).max())
        if len(groups) * width <= SHRINK_AT * growing.numel():
            # Those that grow come first, in their order; ended ones fill up.
            members = growing[groups].int().argsort(dim=1, descending=True, stable=True)[:, :width]
            rows = (groups[:, None] * growing.shape[1] + members).flatten().to(self.row_R.device)
            self.cache.keep(groups.to(rows.device), rows, written)
            for buffer in (self.row_R, self.position_R, self.done_R):
                buffer[: len(rows)] = buffer[rows]
            self.rows = len(rows)
        return True


def growing_rows(
    model: Qwen2VL, vocabulary: Vocabulary, kind: RolloutKind, prompt_size: int
) -> Growing:
    """A rollout's state. On a GPU the model keeps the latest one, with its graphs, for the next
    step's rollout.
    """
    kept = model.rollout_state
    if (
        kept is not None
        and kept.vocabulary is vocabulary
        and kept.kind == kind
        and kept.holds(prompt_size)
    ):
        return kept
    model.rollout_state = None  # its memory goes before the new one's comes
    if not model.embed.weight.is_cuda:
        return Growing(model, vocabulary, kind, prompt_size)
    prompt_size = -(-prompt_size // SPAN_STEP) * SPAN_STEP  # with room for prompts somewhat longer
    model.rollout_state = Growing(model, vocabulary, kind, prompt_size)
    return model.rollout_state
