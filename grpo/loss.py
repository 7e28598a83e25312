"""The GRPO objective (DeepSeekMath, arXiv 2402.03300, equations 3 and 4) and its relatives, as
functions of tensors.

The loss is a weighted sum over tokens. The weights are computed once, from the mask of the whole
step, and each micro-batch takes its slice of them. So the gradient does not depend on how the step
is split.

Variants are knobs that combine: which probability ratio, where it is clipped, which estimate of
the KL divergence, how tokens are averaged. The defaults are GRPO. docs/grpo.md explains each knob,
and configs/presets/ combines them after the papers.

Departure: log-ratios end above at `LARGEST_LOG_RATIO`. A token that is e^20 times likelier under
one of two policies tells nothing, and an infinite ratio would end the run. Beyond, a ratio has no
gradient.
"""

import torch
from torch import Tensor

AVERAGES = ("sequence", "token", "constant")
RATIOS = ("token", "sequence", "detached")
KL_ESTIMATES = ("k3", "k2", "k1")
LARGEST_LOG_RATIO = 20.0


def token_weights(
    mask_NGT: Tensor,
    *,
    average: str = "sequence",
    max_new_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token in the loss, (N, G, T), zero outside the mask.

    Args:
        mask_NGT: bool, the completion tokens of the whole step, each completion up to and
            including its end of turn. A completion without tokens (`mask_truncated`) still counts
            in the divisors of "sequence" and "constant".
        average: "sequence" is equation 3, 1/(N G) sum_i 1/|o_i| sum_t. "token" gives every token
            of the step the same weight, 1 / (number of tokens) (DAPO, arXiv 2503.14476).
            "constant" divides by N G max_new_tokens, whatever the lengths (Dr. GRPO, arXiv
            2503.20783).
        max_new_tokens: the sampler's limit, not the longest completion; needed for "constant".
    """
    mask = mask_NGT.to(dtype)
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


def kl_estimate(logp: Tensor, ref: Tensor, kind: str = "k3") -> Tensor:
    """Each token's estimate of KL(pi_theta || pi_ref), by one of Schulman's three estimators
    (joschu.net/blog/kl-approx.html). With x = log pi_ref - log pi_theta, on tokens that pi_theta
    sampled:

        kind   estimate       mean of the estimate         mean of its gradient
        k1     -x             KL(pi_theta || pi_ref)       zero: it pulls nowhere
        k2     x^2 / 2        close to it while x is small that of KL(pi_theta || pi_ref)
        k3     e^x - x - 1    KL(pi_theta || pi_ref)       that of KL(pi_ref || pi_theta)

    k3 is equation 4, which the paper differentiates as it stands, and so do we. It is never
    negative, while a single token's k1 may be.

    The distributions are those of one token, given its prefix. How a token changes the divergence
    of later ones is in none of the gradients. In the second and later updates on a rollout, the
    tokens are those of pi_old, and all means are a little off.

    Args:
        logp: log pi_theta.
        ref: log pi_ref.
    """
    log_ratio = (ref - logp).clamp(max=LARGEST_LOG_RATIO)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return log_ratio.exp() - log_ratio - 1
    raise ValueError(f"kl must be one of {', '.join(KL_ESTIMATES)}, not {kind!r}")


def probability_ratio(logp: Tensor, old: Tensor, mask: Tensor, kind: str = "token") -> Tensor:
    """pi_theta / pi_old of each token (..., T).

    "sequence" gives all tokens of a completion the geometric mean of their ratios (GSPO, arXiv
    2507.18071, equation 7), and so each of them a part in it. "detached" is the ratio of each
    token, without gradient.
    """
    log_ratio = (logp - old).masked_fill(~mask, 0.0)
    if kind == "sequence":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(-1, keepdim=True) / lengths).expand_as(log_ratio)
    elif kind == "detached":
        log_ratio = log_ratio.detach()
    elif kind != "token":
        raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, not {kind!r}")
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def truncated_importance(old: Tensor, sampled: Tensor, mask: Tensor, cap: float) -> Tensor | None:
    """min(pi_old / pi_sampler, cap) of each token, without gradient; None if `cap` is 0.

    It corrects for a sampler whose probabilities differ from the trainer's (other kernels, other
    precision).

    The cap bounds the variance, as in IMPALA (arXiv 1802.01561, section 4.1). For language models
    it is known as truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training").

    Args:
        old: log pi_old, as the trainer computes it (..., T).
        sampled: log pi_old, as the sampler did.
    """
    return probability_ratio(old, sampled, mask, "detached").clamp(max=cap) if cap else None


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
    ratio: str = "token",
    kl: str = "k3",
    dual_clip: float | None = None,
    importance: Tensor | None = None,
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
            [1 - clip_low, 1 + clip_high]. DAPO's clip-higher (arXiv 2503.14476) has the upper one
            larger.
        beta: weight of the KL term.
        ratio: "token" and "sequence" as in `probability_ratio`. "detached" is CISPO (arXiv
            2506.13585): the clipped ratio only weighs the gradient of log pi_theta, so that no
            token loses its gradient to the clip.
        kl: as in `kl_estimate`.
        dual_clip: c > 1 (arXiv 1912.09729, equation 5): where A < 0, the surrogate is at least
            c A, however likely the completion has become. None is off.
        importance: `truncated_importance` (..., T), which multiplies the surrogate; None is 1.
        weights: this micro-batch's slice (..., T) of `token_weights`; None treats the given tokens
            as the whole step.

    Returns:
        The scalar loss, and detached statistics. Each statistic is summed over tokens with
        `weights`, so that those of the micro-batches add up: "ratio"; "clip_ratio/low_mean" and
        "clip_ratio/high_mean", the share of tokens that the lower and the upper clip (or the dual
        clip) changed; "kl", if there is a reference.
    """
    if weights is None:
        weights = token_weights(mask)
    # Padding may hold anything. Zero it before exp() can turn it into inf or NaN.
    logp, old = logp.masked_fill(~mask, 0.0), old.masked_fill(~mask, 0.0)
    advantages = advantages.unsqueeze(-1)  # all tokens of a completion share one

    r = probability_ratio(logp, old, mask, ratio)  # pi_theta / pi_old
    clipped = r.clamp(1 - clip_low, 1 + clip_high)
    below, above = r < 1 - clip_low, r > 1 + clip_high
    if ratio == "detached":
        surrogate = clipped * advantages * logp
    else:
        surrogate = torch.minimum(r * advantages, clipped * advantages)
        # The minimum takes the clipped side, which has no gradient, only in these two cases.
        below, above = below & (advantages < 0), above & (advantages > 0)
        if dual_clip is not None:
            bounded = torch.maximum(surrogate, dual_clip * advantages)
            surrogate = torch.where(advantages < 0, bounded, surrogate)
            above = above | (r > dual_clip) & (advantages < 0)
    if importance is not None:
        surrogate = surrogate * importance
    per_token = -surrogate
    stats = {"ratio": r, "clip_ratio/low_mean": below, "clip_ratio/high_mean": above}
    if ref is not None:
        divergence = kl_estimate(logp, ref.masked_fill(~mask, 0.0), kl)
        per_token = per_token + beta * divergence
        stats["kl"] = divergence
    elif beta:
        raise ValueError("beta is not 0, so ref must hold the reference's log-probabilities")
    sums = {name: (weights * value.detach()).sum() for name, value in stats.items()}
    return (weights * per_token).sum(), sums
