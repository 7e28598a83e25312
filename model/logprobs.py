"""Log-probabilities of chosen tokens, without ever holding the logits of all positions.

At the published vocabulary a batch of 4,096 completion tokens has 622 million logits, 2.5 GB in fp32, several times
over with their gradient. Here a chunk of positions at a time meets the head; the backward pass makes the chunk's logits
anew from the hidden states and the saved log-normaliser. `naive_logprobs` is the obviously right twin.
"""

import torch
from torch import Tensor


def token_logprobs(
    hidden_MD: Tensor, head_VD: Tensor, tokens_M: Tensor, allowed_V: Tensor, temperature: float = 1.0, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """log pi(token) under the very distribution that is sampled from: temperature applied, forbidden ids left out.

    Args:
        hidden_MD: final hidden states of M positions.
        head_VD: the head's weight.
        tokens_M: the token at each position; it must be an allowed one.
        allowed_V: bool, False for ids that may not be sampled; they are left out of the normaliser too.
        temperature: divides the logits; above 0.
        chunk: positions whose logits are alive at once.

    Returns:
        Log-probabilities (M,) with gradients to `hidden_MD` and `head_VD`, and the entropies (M,) in nats of the
        distributions, without gradient. Both fp32.
    """
    return _ChunkedLogProbs.apply(hidden_MD, head_VD, tokens_M, allowed_V, temperature, chunk)


def naive_logprobs(
    hidden_MD: Tensor, head_VD: Tensor, tokens_M: Tensor, allowed_V: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The twin of `token_logprobs`: all logits at once, gradients by autograd."""
    logp_MV = masked_logits(hidden_MD, head_VD, allowed_V, temperature).log_softmax(dim=-1)
    entropy_M = -(logp_MV.exp() * logp_MV.masked_fill(~allowed_V, 0.0)).sum(dim=-1)
    return logp_MV.gather(-1, tokens_M[:, None]).squeeze(-1), entropy_M.detach()


def masked_logits(hidden: Tensor, head_VD: Tensor, allowed_V: Tensor, temperature: float) -> Tensor:
    """fp32 logits (..., V) divided by the temperature, -inf where not allowed. The sampler and the loss share it."""
    return ((hidden @ head_VD.T).float() / temperature).masked_fill(~allowed_V, float("-inf"))


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, head_VD, tokens_M, allowed_V, temperature, chunk):
        logps, entropies, normalisers = [], [], []
        for hidden, tokens in zip(hidden_MD.split(chunk), tokens_M.split(chunk)):
            logits = masked_logits(hidden, head_VD, allowed_V, temperature)
            normaliser = logits.logsumexp(dim=-1)
            logps.append(logits.gather(-1, tokens[:, None]).squeeze(-1) - normaliser)
            probs = (logits - normaliser[:, None]).exp_()
            # H = log Z - E[logit]; a forbidden id has probability 0, and 0 * -inf must not become NaN.
            entropies.append(normaliser - (probs * logits.masked_fill_(~allowed_V, 0.0)).sum(dim=-1))
            normalisers.append(normaliser)
        normaliser_M = _join(normalisers, hidden_MD)
        ctx.save_for_backward(hidden_MD, head_VD, tokens_M, allowed_V, normaliser_M)
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy_M = _join(entropies, hidden_MD)
        ctx.mark_non_differentiable(entropy_M)
        return _join(logps, hidden_MD), entropy_M

    @staticmethod
    def backward(ctx, grad_M, _):
        hidden_MD, head_VD, tokens_M, allowed_V, normaliser_M = ctx.saved_tensors
        grad_hidden_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_MD), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            hidden, tokens, grad = hidden_MD[rows], tokens_M[rows, None], grad_M[rows, None]
            logits = masked_logits(hidden, head_VD, allowed_V, ctx.temperature)
            # d logp(token) / d logits = onehot(token) - softmax; the temperature divides once more.
            grad_logits = (logits - normaliser_M[rows, None]).exp_().mul_(-grad)
            grad_logits.scatter_add_(-1, tokens, grad).div_(ctx.temperature)
            if grad_hidden_MD is not None:
                grad_hidden_MD[rows] = grad_logits.to(head_VD.dtype) @ head_VD
            if grad_head_VD is not None:
                grad_head_VD += grad_logits.to(hidden.dtype).T @ hidden
        return grad_hidden_MD, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype), None, None, None, None


def _join(pieces: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(pieces) if pieces else like.new_zeros(0, dtype=torch.float32)
