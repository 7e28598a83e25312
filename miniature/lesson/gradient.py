"""Gradients of many sampled steps, and how they compare with an exact gradient.

The exact gradient of the expected reward differentiates a sum over all completions. It is divided
by LIMIT, because the constant average of the loss divides by G * LIMIT.

Suffixes of names: R replicates (independent steps), N questions of a step, G completions of each,
D all logits of a policy; and those of policy.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from common.config import Config
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss, kl_estimate, token_weights
from grpo.rollout import informative_groups
from training.scoring import length_penalty

from .policy import LIMIT, MASK_OT, REWARDS_QO, completion_logprobs, expected_reward, probabilities

AT_ONCE = 500  # replicates; with more, their tensors would not fit the processor's cache

Stats = dict[str, Tensor]


class Groups(NamedTuple):
    """The samples of a step: its questions (N,), and their completions (N, G), as indices. Those of
    many steps begin with a dimension R.
    """

    questions_N: Tensor
    completions_NG: Tensor

    def of(self, x_QO: Tensor) -> Tensor:
        """The entries (N, G, ...) of a tensor (Q, O, ...) of all completions."""
        return x_QO[self.questions_N[..., None], self.completions_NG]

    def mask(self) -> Tensor:
        """The completion tokens, (N, G, T)."""
        return MASK_OT[self.completions_NG]

    def rewards(self, penalised_share: float = 0.0) -> Tensor:
        """The rewards (N, G), less the length penalty if there is one."""
        rewards_NG = self.of(REWARDS_QO)
        if penalised_share:
            rewards_NG = rewards_NG - length_penalty(self.mask().sum(-1), LIMIT, penalised_share)
        return rewards_NG

    def have_equal_rewards(self) -> Tensor:
        """Whether all rewards of a group are equal, (N,)."""
        return self.rewards().amax(-1) == self.rewards().amin(-1)


def sample_groups(
    logits_QPV: Tensor, questions_RN: Tensor, group_size: int, generator: torch.Generator
) -> Groups:
    """A group for each question of each step, sampled from one policy or from one per step."""
    R, N = questions_RN.shape
    p_RQO = probabilities(logits_QPV).expand(R, -1, -1)
    p_RNO = p_RQO[torch.arange(R)[:, None], questions_RN]
    drawn = p_RNO.flatten(0, 1).multinomial(group_size, replacement=True, generator=generator)
    return Groups(questions_RN, drawn.unflatten(0, (R, N)))


def keep_informative(groups: Groups, config: Config) -> Groups:
    """The N groups of each step that dynamic sampling keeps."""
    kept = []
    for scores_NG in groups.rewards():  # without the length penalty, as in training
        kept.append(informative_groups(scores_NG, config.prompts_per_step))
    steps_R, kept_RN = torch.arange(len(kept))[:, None], torch.tensor(kept)
    return Groups(groups.questions_N[steps_R, kept_RN], groups.completions_NG[steps_R, kept_RN])


def step_loss(
    logits_QPV: Tensor,
    groups: Groups,
    old_QPV: Tensor,
    ref_QPV: Tensor,
    config: Config,
    bonus: float = 0.0,
) -> tuple[Tensor, Stats]:
    """The loss of one step and its statistics, by the functions that train.py calls.

    `bonus` is added to all rewards.
    """
    rewards_NG, mask_NGT = groups.rewards(config.length_penalty) + bonus, groups.mask()
    baseline, scale = config.advantage_baseline, config.advantage_scale
    weights_NGT = token_weights(mask_NGT, average=config.loss_average, max_new_tokens=LIMIT)
    loss, sums = grpo_loss(
        groups.of(completion_logprobs(logits_QPV)),
        old=groups.of(completion_logprobs(old_QPV)),
        ref=groups.of(completion_logprobs(ref_QPV)) if config.beta else None,
        advantages=group_advantages(rewards_NG, baseline=baseline, scale=scale),
        mask=mask_NGT,
        weights=weights_NGT,
        **config.objective,
    )
    return loss, sums | {"weights": weights_NGT.sum()}


def kl_loss(logits_QPV: Tensor, groups: Groups, ref_QPV: Tensor, kind: str) -> tuple[Tensor, Stats]:
    """The KL term alone, with the constant average."""
    logp_NGT = groups.of(completion_logprobs(logits_QPV))
    ref_NGT = groups.of(completion_logprobs(ref_QPV))
    weights_NGT = token_weights(groups.mask(), average="constant", max_new_tokens=LIMIT)
    estimate = (weights_NGT * kl_estimate(logp_NGT, ref_NGT, kind)).sum()
    return estimate, {"kl": estimate}


def loss_gradients(
    loss: Callable[..., tuple[Tensor, Stats]], logits: Tensor, groups: Groups
) -> tuple[Tensor, Stats]:
    """The gradient of each step's loss (R, Q, P, V), and its statistics (R,).

    `logits` is one policy, or one per step. vmap turns the loss of one step into that of R steps.
    """
    shared = None if logits.ndim == 3 else 0
    of_each = vmap(grad(loss, has_aux=True), in_dims=(shared, 0), chunk_size=AT_ONCE)
    return of_each(logits, groups)


def step_gradients(
    config: Config,
    groups: Groups,
    sampler_QPV: Tensor,
    logits: Tensor | None = None,
    bonus: float = 0.0,
) -> tuple[Tensor, Stats]:
    """The gradient of each step's objective (R, Q, P, V), and its statistics (R,).

    `logits` are the policies (R, Q, P, V), where they are no longer the one that sampled.
    """
    loss = partial(step_loss, old_QPV=sampler_QPV, ref_QPV=sampler_QPV, config=config, bonus=bonus)
    gradients, stats = loss_gradients(loss, sampler_QPV if logits is None else logits, groups)
    return -gradients, stats  # the loss is minus the objective


def exact_gradient(logits_QPV: Tensor) -> Tensor:
    """The gradient of the expected reward over LIMIT, (Q, P, V)."""
    return grad(expected_reward)(logits_QPV) / LIMIT


class Comparison(NamedTuple):
    """Sampled gradients beside an exact one, whose length is the unit of length and noise.

    `cosine` (with the exact gradient) and `length` are those of the mean gradient, each with a
    standard error. `noise` is the standard deviation of one step's gradient. A mean that is zero as
    far as can be told has no direction, and the cosine is NaN.
    """

    cosine: float
    cosine_error: float
    length: float
    length_error: float
    noise: float


def compare(gradients: Tensor, exact: Tensor) -> Comparison:
    gradients_RD, exact_D = gradients.flatten(1), exact.flatten()
    unit, mean_D = exact_D.norm(), gradients_RD.mean(0)
    variance = gradients_RD.var(0).sum()
    noise = (variance.sqrt() / unit).item()
    # The square of a noisy mean is too large by the variance of that mean, on average.
    surplus = variance / len(gradients_RD)
    square = mean_D.square().sum() - surplus
    if square < surplus:
        return Comparison(math.nan, math.nan, 0.0, (surplus.sqrt() / unit).item(), noise)
    length = square.sqrt()
    cosine = mean_D @ exact_D / (length * unit)
    # Standard errors by the delta method: project on the derivative of each figure.
    by_length_D = mean_D / length
    by_cosine_D = (exact_D / unit - cosine * by_length_D) / length
    cosine_error = standard_error(gradients_RD @ by_cosine_D)
    length_error = standard_error(gradients_RD @ by_length_D / unit)
    return Comparison(cosine.item(), cosine_error, (length / unit).item(), length_error, noise)


def standard_error(values_R: Tensor) -> float:
    return (values_R.std() / len(values_R) ** 0.5).item()
