"""The GRPO objective (DeepSeekMath, arXiv 2402.03300, equations 3 and 4), as functions of tensors.

The loss is a weighted sum over tokens. The weights are computed once, from the mask of the whole
step, and each micro-batch takes its slice of them. So the gradient does not depend on how the step
is split.

Departures: the clip range may differ below and above 1 (clip-higher, DAPO, arXiv 2503.14476). The
average may be taken over all tokens (DAPO) or against a constant (Dr. GRPO, arXiv 2503.20783)
instead of per completion.
"""

import torch
from torch import Tensor


def token_weights(
    mask_NGT: Tensor, *, average: str = "sequence", max_new_tokens: int | None = None
) -> Tensor:
    """The weight of each token in the loss, float32 (N, G, T), zero outside the mask.

    Args:
        mask_NGT: bool, the completion tokens of the whole step, each completion up to and
            including its end of turn.
        average: "sequence" is equation 3, 1/(N G) sum_i 1/|o_i| sum_t. "token" gives every token
            of the step the same weight, 1 / (number of tokens). "constant" divides by
            N G max_new_tokens, whatever the lengths.
        max_new_tokens: the sampler's limit, not the longest completion; needed for "constant".
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
    """The KL estimate of equation 4 per token, r - log r - 1 with r = pi_ref / pi_theta.

    This is Schulman's k3 estimator. It is never negative, and on tokens sampled from pi_theta its
    mean is KL(pi_theta || pi_ref). Its gradient, however, is on average that of
    KL(pi_ref || pi_theta). The paper differentiates it as it stands, and so do we.

    Args:
        logp: log pi_theta.
        ref: log pi_ref.
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
    """Minus the objective of equation 3: -(clipped surrogate - beta * KL), averaged by `weights`.

    Args:
        logp: log pi_theta of each completion token (..., T), with gradient.
        old: log pi_old, under the policy that sampled; without gradient. With one update per
            rollout it is `logp.detach()`.
        ref: log pi_ref, under the frozen reference; may be None when beta is 0.
        advantages: A_i, one per completion (...,).
        mask: bool (..., T), True on completion tokens, False on padding.
        clip_low, clip_high: epsilon, below and above: the ratio is clipped to
            [1 - clip_low, 1 + clip_high].
        beta: weight of the KL term.
        weights: this micro-batch's slice (..., T) of `token_weights`; None treats the given tokens
            as the whole step.

    Returns:
        The scalar loss, and detached statistics. Each statistic is summed over tokens with
        `weights`, so that those of the micro-batches add up: "ratio"; "clip_ratio/low_mean" and
        "clip_ratio/high_mean", the share of tokens that lost their gradient to the lower and the
        upper clip; "kl", if there is a reference.
    """
    if weights is None:
        weights = token_weights(mask)
    # Padding may hold anything. Zero it before exp() can turn it into inf or NaN.
    logp, old = logp.masked_fill(~mask, 0.0), old.masked_fill(~mask, 0.0)
    advantages = advantages.unsqueeze(-1)  # all tokens of a completion share one

    ratio = (logp - old).exp()  # pi_theta / pi_old
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    per_token = -surrogate
    # The clip removes the gradient where ratio < 1 - low and A < 0, or ratio > 1 + high and A > 0.
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
        raise ValueError("beta is not 0, so ref must hold the reference's log-probabilities")
    sums = {name: (weights * value.detach()).sum() for name, value in stats.items()}
    return (weights * per_token).sum(), sums
