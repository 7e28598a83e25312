"""Grouped rollouts: every prompt, with its image, is run once; its G completions grow from the one cache.

What is sampled is exactly the distribution that is trained: the temperature, and the ids that can't be sampled, are in
the loss's normaliser too, and there is no top-k or top-p. Randomness is data: one number per (seed, step, prompt,
sample, position), drawn up front and turned into a token through the inverse of the cumulative distribution. So a
completion depends (up to rounding) neither on what else is in the batch nor on how many processes share the work, and a
resumed run needs no generator's state.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data import Prompt, Vocabulary
from model import InputError, Qwen2VL
from model.logprobs import masked_logits

from .batch import Rollout, collate

ASK_EVERY = 8
"""Decoding steps between two questions to the device whether all completions have ended: each makes the host wait."""


def sampling_noise(seed: int, step: int, prompts: Sequence[int], group_size: int, max_new_tokens: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N, G, T); `prompts` are places in the step, over all processes."""
    shape = (group_size, max_new_tokens)
    streams = (np.random.default_rng([seed, step, place]) for place in prompts)
    return torch.from_numpy(np.stack([stream.random(shape, dtype=np.float32) for stream in streams]))


def inverse_cdf(logp: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the noise: logp (..., V), noise (...) -> ids (...).

    Sums in float64: over 150,000 tokens float32 would shift the odds of the last ones. A token of probability 0 is
    never chosen, because it does not raise the cumulative sum. (NaN would give an id past the end: hence the clamp.)
    """
    cumulative = logp.double().exp().cumsum(dim=-1)
    threshold = noise.double()[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logp.shape[-1] - 1)


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
        noise_NGT: from `sampling_noise`; its shape says G and T. None decodes one completion of at most
            `max_new_tokens` greedily.
        temperature: divides the logits, in sampling and in the log-probabilities returned.
        watch: called with each step's tokens (N, G) as they are chosen, for showing them.
    """
    device = model.embed.weight.device
    N, G, T = (len(prompts), 1, max_new_tokens) if noise_NGT is None else noise_NGT.shape
    noise_NGT = None if noise_NGT is None else noise_NGT.to(device)
    batch = collate(prompts, device)
    ends = torch.tensor(vocabulary.end_ids, device=device)
    tokens = torch.full((N, G, T), vocabulary.end_ids[0], device=device)
    logps = torch.zeros(N, G, T, device=device)
    mask = torch.zeros(N, G, T, dtype=torch.bool, device=device)
    done = torch.zeros(N, G, dtype=torch.bool, device=device)
    after_prompt_N = batch.positions_3NP.amax(dim=(0, 2)) + 1  # where all completions of a prompt go on

    last, cache = model.prefill(*batch.parts(), G, T)
    hidden = last[:, None].expand(N, G, -1)
    for t in range(T):
        logp_NGV = masked_logits(hidden, model.head_weight, vocabulary.allowed_V, temperature).log_softmax(dim=-1)
        chosen = logp_NGV.argmax(dim=-1) if noise_NGT is None else inverse_cdf(logp_NGV, noise_NGT[..., t])
        tokens[..., t] = torch.where(done, ends[0], chosen)
        logps[..., t] = logp_NGV.gather(-1, chosen[..., None]).squeeze(-1).masked_fill(done, 0.0)
        mask[..., t] = ~done
        done |= torch.isin(chosen, ends)
        if watch is not None:
            watch(tokens[..., t])
        if t + 1 == T or ((t + 1) % ASK_EVERY == 0 and bool(done.all())):
            break
        hidden = model.decode(tokens[..., t], after_prompt_N + t, cache)

    if not bool(logps.isfinite().all()):
        raise InputError("the model's probabilities are not finite: its weights are damaged, or training has diverged")
    kept = int(mask.sum(-1).max())
    tokens, mask, logps = tokens[..., :kept], mask[..., :kept], logps[..., :kept]
    lengths, rows = mask.sum(-1).tolist(), tokens.cpu()
    texts = [[vocabulary.decode(rows[n, g, : lengths[n][g]]) for g in range(G)] for n in range(N)]
    return Rollout(prompts, tokens, mask, logps, done, texts)
