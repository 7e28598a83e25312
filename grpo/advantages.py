"""Advantages relative to the group (DeepSeekMath, arXiv 2402.03300, section 4.1.2): what a reward
is compared with, and what the difference is divided by.

Departures: standard deviations have Bessel's correction, as in the common trainers (the paper
leaves this open). The divisor has no epsilon, so scaling all rewards leaves scaled advantages
unchanged. A group of equal rewards gets exact zeros instead of a division by zero.
"""

import torch
from torch import Tensor

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "batch_std", "none")


def group_advantages(rewards_NG: Tensor, *, baseline: str = "mean", scale: str = "std") -> Tensor:
    """The advantages A_i = (r_i - b_i) / s.

    Args:
        rewards_NG: r_i, one reward per completion; the last dimension is the group.
        baseline: b_i. "mean" is the group's mean (GRPO). It contains r_i itself, so that without
            scaling the expected gradient is (G - 1) / G of the policy gradient. "leave_one_out" is
            the mean of the G - 1 others (RLOO, arXiv 2402.14740), whose expected gradient is the
            policy gradient. "none" is 0 (REINFORCE): the same expectation, and mostly more
            variance.
        scale: s. "std" is the group's standard deviation (GRPO). "batch_std" is that of all the
            step's rewards (arXiv 2508.08221). "none" is 1 (Dr. GRPO, arXiv 2503.20783, which finds
            that dividing by a group's own favours questions that are nearly solved or nearly
            hopeless).

    Returns:
        fp32 (float64 if given float64), same shape. With a baseline, zero for a group of equal
        rewards.
    """
    for value, known in ((baseline, BASELINES), (scale, SCALES)):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    rewards = rewards_NG if rewards_NG.dtype == torch.float64 else rewards_NG.float()
    size = rewards.shape[-1]
    advantages = rewards
    if baseline != "none":
        advantages = rewards - rewards.mean(-1, keepdim=True)
        # The mean of equal numbers may be rounded slightly off them.
        advantages = advantages.masked_fill(_equal(rewards, -1), 0.0)
    if baseline == "leave_one_out" and size > 1:
        # (G - 1) (r_i - mean of the others) = G (r_i - mean of all)
        advantages = advantages * (size / (size - 1))
    if scale != "none":
        over = -1 if scale == "std" else tuple(range(rewards.ndim))
        advantages = advantages / _std(rewards, over)
    return advantages


def _std(rewards: Tensor, over: int | tuple[int, ...]) -> Tensor:
    """The standard deviation over some dimensions, and 1 where all rewards are equal."""
    equal = _equal(rewards, over)
    correction = min(1, rewards.numel() // equal.numel() - 1)
    return rewards.std(over, keepdim=True, correction=correction).masked_fill(equal, 1.0)


def _equal(rewards: Tensor, over: int | tuple[int, ...]) -> Tensor:
    return rewards.amax(over, keepdim=True) == rewards.amin(over, keepdim=True)
