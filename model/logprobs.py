"""Log-probabilities of given tokens, without ever holding the logits of all ids.

With the published vocabulary, 4,096 completion tokens have 622 million logits: 2.5 GB in fp32, and
several times that with their gradients. Here the logits of all positions are computed for one block
of ids at a time, with a running maximum and sum (as in online softmax, Milakov and Gimelshein 2018,
arXiv 1805.02867). The backward pass recomputes each block's logits from the hidden states and the
saved log-normaliser, and writes that block of the head's gradient once. `naive_logprobs` is the
slow twin, correct at a glance.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import linear

# The size limit of one block of fp32 logits. Two or three blocks are alive at once, and larger ones
# do not fit the CPU's cache.
LOGITS_BYTES = 1 << 24

# The logit of a forbidden id. Its probability is exactly 0, and 0 times it is 0, where 0 times -inf
# would be NaN.
_NEVER = -1e30


def token_logprobs(
    hidden_MD: Tensor,
    head_VD: Tensor,
    tokens_M: Tensor,
    allowed_V: Tensor,
    temperature: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[Tensor, Tensor]:
    """log pi(token) under the distribution that is sampled: with temperature, no forbidden ids.

    Args:
        hidden_MD: final hidden states of M positions.
        head_VD: the head's weight.
        tokens_M: the token at each position, which must be allowed.
        allowed_V: bool, False for ids that may not be sampled; the normaliser excludes them too.
        temperature: divides the logits; above 0.
        logits_bytes: memory for one block of logits.

    Returns:
        The log-probabilities (M,), with gradients for `hidden_MD` and `head_VD`, and the entropies
        (M,) of the distributions in nats, without gradient. Both are fp32.
    """
    return _BlockedLogProbs.apply(
        hidden_MD, head_VD, tokens_M, allowed_V, temperature, logits_bytes
    )


def naive_logprobs(
    hidden_MD: Tensor,
    head_VD: Tensor,
    tokens_M: Tensor,
    allowed_V: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The slow twin of `token_logprobs`: all logits at once, gradients by autograd."""
    logits_MV = (hidden_MD @ head_VD.T).float() / temperature
    logp_MV = logits_MV.masked_fill(~allowed_V, float("-inf")).log_softmax(dim=-1)
    logp_M = logp_MV.gather(-1, tokens_M[:, None]).squeeze(-1)
    # Forbidden ids must contribute 0, but 0 times -inf would be NaN.
    terms_MV = logp_MV.exp() * logp_MV.masked_fill(~allowed_V, 0.0)
    return logp_M, -terms_MV.sum(dim=-1).detach()


def masked_logits(hidden: Tensor, head_VD: Tensor, allowed_V: Tensor, temperature: float) -> Tensor:
    """fp32 logits (..., V) over the temperature, forbidden ids masked; for sampler and loss."""
    logits = linear(hidden, head_VD).float()
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.masked_fill_(~allowed_V, _NEVER)


class _BlockedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, head_VD, tokens_M, allowed_V, temperature, logits_bytes):
        ctx.temperature = temperature
        ctx.blocks = _blocks(len(hidden_MD), len(head_VD), logits_bytes)
        # Over the ids so far: the highest logit, and the sums of exp(logit) and exp(logit) * logit
        # with logits relative to it.
        highest = hidden_MD.new_full(tokens_M.shape, float("-inf"), dtype=torch.float32)
        mass, moment, chosen = highest.new_zeros(3, len(highest))
        for ids in ctx.blocks:
            logits = masked_logits(hidden_MD, head_VD[ids], allowed_V[ids], temperature)
            inside, place = _within(tokens_M, ids)
            logit = logits.gather(-1, place).squeeze(-1)
            chosen = torch.where(inside, logit, chosen)
            higher = torch.maximum(highest, logits.amax(dim=-1))
            rescale = (highest - higher).exp()
            odds = logits.sub_(higher[:, None]).exp()
            # Make both sums relative to the new maximum. Shifting all logits by `shift` adds
            # mass * shift to the moment. Before the first block the mass is 0, and 0 times -inf
            # would be NaN.
            shift = torch.where(mass > 0, highest - higher, 0.0)
            moved = moment + mass * shift
            # As a matrix product, because that needs no tensor of odds * logits.
            weighted = torch.bmm(odds.unsqueeze(1), logits.unsqueeze(2)).flatten()
            moment = moved * rescale + weighted
            mass = mass * rescale + odds.sum(dim=-1)
            highest = higher
        normaliser = highest + mass.log()
        ctx.save_for_backward(hidden_MD, head_VD, tokens_M, allowed_V, normaliser)
        entropy = mass.log() - moment / mass  # H = log Z - E[logit]
        ctx.mark_non_differentiable(entropy)
        return chosen - normaliser, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M, _):
        hidden_MD, head_VD, tokens_M, allowed_V, normaliser = ctx.saved_tensors
        grad_hidden_MD = torch.zeros_like(hidden_MD, dtype=torch.float32)
        grad_head_VD = torch.empty_like(head_VD)
        scale = grad_M / ctx.temperature
        for ids in ctx.blocks:
            logits = masked_logits(hidden_MD, head_VD[ids], allowed_V[ids], ctx.temperature)
            inside, place = _within(tokens_M, ids)
            # d logp(token) / d logits = onehot(token) - softmax, over the temperature (in `scale`).
            softmax = logits.sub_(normaliser[:, None]).exp_()
            grad = softmax.mul_(-scale[:, None])
            onehot = torch.where(inside, scale, 0.0)
            grad.scatter_add_(-1, place, onehot[:, None])
            grad = grad.to(hidden_MD.dtype)
            grad_hidden_MD += linear(grad, head_VD[ids].T)
            grad_head_VD[ids] = linear(grad.T, hidden_MD.T)
        return grad_hidden_MD.to(hidden_MD.dtype), grad_head_VD, None, None, None, None


def _blocks(positions: int, ids: int, logits_bytes: int) -> list[slice]:
    """Slices of the vocabulary whose fp32 logits at all positions fit into `logits_bytes`.

    The last slice may reach beyond the end.
    """
    size = max(1, logits_bytes // (4 * max(1, positions)))
    size = size // 64 * 64 or size  # round sizes suit matrix products
    return [slice(start, start + size) for start in range(0, ids, size)]


def _within(tokens_M: Tensor, ids: slice) -> tuple[Tensor, Tensor]:
    """Which tokens are in the block (M,), and their places in it (M, 1), arbitrary for the rest."""
    inside = (tokens_M >= ids.start) & (tokens_M < ids.stop)
    place = tokens_M.clamp(ids.start, ids.stop - 1) - ids.start
    return inside, place[:, None]
