"""The GRPO objective (DeepSeekMath, arXiv 2402.03300, equations 3 and 4) as functions of tensors.

The sum over tokens has explicit weights, made once from the whole step's mask. A micro-batch gets
its slice of them, so that the size of micro-batches does not change the gradient.

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
        mask_NGT: bool, the whole step's completion tokens, up to and including the end of turn.
        average: "sequence" is equation 3, 1/(N G) sum_i 1/|o_i| sum_t; "token" gives every token
            of the step the same weight, 1 / (all tokens); "constant" divides by
            N G max_new_tokens, whatever the lengths.
        max_new_tokens: the sampler's limit, not the longest completion; for "constant".
    """
    mask = mask_NGT.float()
    completions = mask.shape[:-1].numel()
    if average == "sequence":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        return mask / lengths / completions
    if average == "token":
        return mask / mask.sum().clamp(min=1)
    if average == "constant" and max_new_tokens:
        return mask / (completions * max_new_tokens)
    raise ValueError(
        f"average must be 'sequence', 'token' or, with max_new_tokens, 'constant', not {average!r}"
    )


def k3_divergence(logp: Tensor, ref: Tensor) -> Tensor:
    """Equation 4, r - log r - 1 with r = pi_ref / pi_theta, per token; never negative.

    On tokens sampled from pi_theta its mean is KL(pi_theta || pi_ref): Schulman's k3 estimator.
    But its gradient is on average that of KL(pi_ref || pi_theta). The paper differentiates it as it
    stands, and so do we.
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
    """-(clipped surrogate - beta * KL estimate), averaged by `weights`: minus equation 3.

    Args:
        logp: log pi_theta of each completion token (..., T), with gradient.
        old: log pi_old, the policy that sampled; without gradient. With one update per rollout it
            is `logp.detach()`.
        ref: log pi_ref of the frozen reference; may be None when beta is 0.
        advantages: one per completion (...,).
        mask: bool (..., T), which tokens are real.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        beta: weight of the KL term.
        weights: (..., T) from `token_weights`, this micro-batch's slice; None takes the tokens
            given as the whole step.

    Returns:
        The scalar loss, and detached statistics, each summed over tokens with `weights` so that
        they add up over micro-batches: "ratio"; "clip_ratio/low_mean" and "clip_ratio/high_mean",
        the tokens whose gradient the clip removed below and above; with a reference "kl".
    """
    if weights is None:
        weights = token_weights(mask)
    # Padding may hold anything; it is zeroed before exp() can make inf or NaN of it.
    logp, old = logp.masked_fill(~mask, 0.0), old.masked_fill(~mask, 0.0)
    advantages = advantages.unsqueeze(-1)  # one for all tokens of a completion

    ratio = (logp - old).exp()  # pi_theta / pi_old
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    per_token = -surrogate
    # No gradient where the clip bites: ratio < 1 - low with A < 0, or ratio > 1 + high with A > 0.
    stats = {
        "ratio": ratio,
        "clip_ratio/low_mean": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > 1 + clip_high) & (advantages > 0),
    }
    if ref is not None:
        kl = k3_divergence(logp, ref.masked_fill(~mask, 0.0))
        per_token = per_token + beta * kl
        stats["kl"] = kl
    elif beta:
        raise ValueError("beta is not 0, so the reference's log-probabilities are needed")
    sums = {name: (weights * value.detach()).sum() for name, value in stats.items()}
    return (weights * per_token).sum(), sums
