"""Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

Departures: the standard deviation has Bessel's correction, as in the common trainers (the paper
leaves this open). The divisor has no epsilon, so scaling all rewards leaves the advantages
unchanged. A group of equal rewards gets exact zeros instead of a division by zero.
"""

import torch
from torch import Tensor


def group_advantages(rewards_NG: Tensor, *, scale: str = "std") -> Tensor:
    """The advantages A_i = (r_i - mean(r)) / std(r) within each group.

    Args:
        rewards_NG: r_i, one reward per completion; the last dimension is the group.
        scale: "std" divides by the group's standard deviation (GRPO); "none" does not (Dr. GRPO,
            arXiv 2503.20783, which finds that the division favours questions that are nearly
            solved or nearly hopeless).

    Returns:
        fp32 (float64 if given float64), same shape. Zero for a group of equal rewards.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', not {scale!r}")
    rewards = rewards_NG if rewards_NG.dtype == torch.float64 else rewards_NG.float()
    # Compare rewards, not advantages: the mean of equal numbers may be rounded slightly off them.
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if scale == "std":
        bessel = 1 if rewards.shape[-1] > 1 else 0
        std = rewards.std(-1, keepdim=True, correction=bessel)
        advantages = advantages / std.where(~equal, 1.0)
    return advantages.where(~equal, 0.0)
