"""The GRPO objective (DeepSeekMath, arXiv 2402.03300, equations 3 and 4), as pure functions of
tensors.

The sum over tokens is weighted by explicit weights that are made once from the whole step's mask: a
micro-batch gets its slice of them, so that neither the size of micro-batches nor the number of
processes changes the gradient.

Departures: the clip range may differ below and above 1 (clip-higher, DAPO, arXiv 2503.14476); the
average may be taken over tokens (DAPO) or against a constant (Dr. GRPO, arXiv 2503.20783) instead
of per sequence.
"""

import torch
from torch import Tensor


def token_weights(
    mask_NGT: Tensor, *, average: str = "sequence", max_new_tokens: int | None = None
) -> Tensor:
    """How much each token counts in the loss, float32 (N, G, T), zero outside the mask.

    Args:
        mask_NGT: bool, the whole step's completion tokens, up to and including the first
            end-of-turn.
        average: "sequence" is equation 3, 1/(N G) sum_i 1/|o_i| sum_t; "token" gives every token of
            the step the same weight, 1 / (all tokens); "constant" divides by N G max_new_tokens,
            whatever the lengths.
        max_new_tokens: the limit of the sampler, not the longest completion of this step; for
            "constant".
    """
    mask = mask_NGT.float()
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    sequences = mask.shape[:-1].numel()
    if average == "sequence":
        return mask / lengths / sequences
    if average == "token":
        return mask / mask.sum().clamp(min=1)
    if average == "constant" and max_new_tokens:
        return mask / (sequences * max_new_tokens)
    raise ValueError(
        f"average must be 'sequence', 'token' or, with max_new_tokens, 'constant', not {average!r}"
    )


def k3_divergence(logp: Tensor, ref: Tensor) -> Tensor:
    """Equation 4, r - log r - 1 with r = pi_ref / pi_theta, per token; never negative.

    On tokens sampled from pi_theta its mean is KL(pi_theta || pi_ref). Its gradient's mean is
    another one's: that of KL(pi_ref || pi_theta). The paper differentiates it as it stands, and so
    do we.
    """
    log_ratio = ref - logp
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(
    logp: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus equation 3: clipped surrogate minus beta times the KL estimate.

    Args:
        logp: log pi_theta of each completion token (..., T), with gradient.
        old: log pi_old, the policy that sampled; without gradient. With one update per rollout it
            is `logp.detach()`.
        ref: log pi_ref of the frozen reference; may be None when beta is 0.
        advantages: one per completion (...,).
        mask: bool (..., T), which tokens are real.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        beta: weight of the KL term.
        weights: (..., T) from `token_weights`, this micro-batch's part; None takes the tokens given
            as the whole step.

    Returns:
        The scalar loss, and detached statistics, each summed over tokens with `weights` so that
        they add up over micro-batches: "clip_fraction" (tokens whose gradient the clip cut off),
        "ratio", and with a reference "kl".
    """
    if weights is None:
        weights = token_weights(mask)
    # What padding holds may be anything; it is put out of the way before exp() can make inf or NaN
    # of it.
    log_ratio = (logp - old).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages.unsqueeze(-1)
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    )
    per_token = -surrogate
    clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | (
        (ratio > 1 + clip_high) & (advantages > 0)
    )
    stats = {"clip_fraction": clipped.float(), "ratio": ratio}
    if ref is not None:
        kl = k3_divergence(logp.masked_fill(~mask, 0.0), ref.masked_fill(~mask, 0.0))
        per_token = per_token + beta * kl
        stats["kl"] = kl
    elif beta:
        raise ValueError("beta is not 0, so the reference's log-probabilities are needed")
    return (weights * per_token).sum(), {
        name: (weights * value.detach()).sum() for name, value in stats.items()
    }
