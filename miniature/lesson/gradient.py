"""Gradients of many sampled steps, and how they compare with an exact gradient.

Suffixes of names: R replicates (independent steps), N questions of a step, G completions of each,
D all logits of a policy; and those of policy.py.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from common.config import Config
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss, token_weights
from grpo.rollout import informative_groups
from training.scoring import length_penalty

from .policy import LIMIT, MASK_OT, REWARDS_QO, START, completion_logprobs, probabilities

AT_ONCE = 500  # replicates; with more, their tensors would not fit the processor's cache


class Groups(NamedTuple):
    """The samples of a step: its questions (N,) and their completions (N, G), as indices, and the
    rewards (N, G). Those of many steps begin with a dimension R.
    """

    questions_N: Tensor
    completions_NG: Tensor
    rewards_NG: Tensor

    def logprobs(self, logits_QPV: Tensor) -> Tensor:
        """log pi(o_t | q, o_<t) of the groups' tokens, (N, G, T)."""
        logp_QOT = completion_logprobs(logits_QPV)
        return logp_QOT[self.questions_N[..., None], self.completions_NG]

    def have_equal_rewards(self) -> Tensor:
        """Whether all rewards of a group are equal, (N,)."""
        return self.rewards_NG.amax(-1) == self.rewards_NG.amin(-1)


def sample_groups(
    logits_QPV: Tensor, questions_RN: Tensor, group_size: int, generator: torch.Generator
) -> Groups:
    """A group for each question of each step, sampled from one policy or from one per step."""
    R, N = questions_RN.shape
    p_RQO = probabilities(logits_QPV).expand(R, -1, -1)
    p_RNO = p_RQO[torch.arange(R)[:, None], questions_RN]
    drawn = p_RNO.flatten(0, 1).multinomial(group_size, replacement=True, generator=generator)
    completions_RNG = drawn.unflatten(0, (R, N))
    rewards_RNG = REWARDS_QO[questions_RN[..., None], completions_RNG]
    return Groups(questions_RN, completions_RNG, rewards_RNG)


def keep_informative(groups: Groups, config: Config) -> Groups:
    """The N groups of each step that dynamic sampling keeps."""
    kept = []
    for rewards_NG in groups.rewards_NG:  # without the length penalty, as in training
        kept.append(informative_groups(rewards_NG, config.prompts_per_step))
    steps_R, kept_RN = torch.arange(len(kept))[:, None], torch.tensor(kept)
    return Groups(*(each[steps_R, kept_RN] for each in groups))


def step_loss(
    logits_QPV: Tensor, groups: Groups, old_QPV: Tensor, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one step and its statistics, by the functions that train.py calls."""
    mask_NGT = MASK_OT[groups.completions_NG]
    rewards_NG = groups.rewards_NG
    if config.length_penalty:
        penalty_NG = length_penalty(mask_NGT.sum(-1), LIMIT, config.length_penalty)
        rewards_NG = rewards_NG - penalty_NG
    baseline, scale = config.advantage_baseline, config.advantage_scale
    weights_NGT = token_weights(mask_NGT, average=config.loss_average, max_new_tokens=LIMIT)
    loss, sums = grpo_loss(
        groups.logprobs(logits_QPV),
        old=groups.logprobs(old_QPV),
        ref=groups.logprobs(START.to(logits_QPV.dtype)) if config.beta else None,
        advantages=group_advantages(rewards_NG, baseline=baseline, scale=scale),
        mask=mask_NGT,
        weights=weights_NGT,
        **config.objective,
    )
    return loss, sums | {"weights": weights_NGT.sum()}


def step_gradients(
    config: Config, groups: Groups, logits: Tensor = START
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of each step's objective (R, Q, P, V), and its statistics (R,).

    `logits` is one policy, or one per step; ratios are to START. vmap turns the loss of one step
    into that of R steps.
    """
    loss = partial(step_loss, old_QPV=START, config=config)
    per_step = None if logits.ndim == 3 else 0
    of_each = vmap(grad(loss, has_aux=True), in_dims=(per_step, 0), chunk_size=AT_ONCE)
    gradients, stats = of_each(logits, groups)
    return -gradients, stats  # the loss is minus the objective


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float

    def text(self, digits: int = 3) -> str:
        if math.isnan(self.value):
            return "none"
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def mean_of(values_R: Tensor) -> Estimate:
    return Estimate(values_R.mean().item(), standard_error(values_R))


def standard_error(values_R: Tensor) -> float:
    return (values_R.std() / len(values_R) ** 0.5).item()


class Comparison(NamedTuple):
    """Sampled gradients beside an exact one, whose length is the unit of length and noise.

    `cosine` (with the exact gradient) and `length` are those of the mean gradient. `noise` is the
    standard deviation of one step's gradient. A mean that is zero as far as can be told has no
    direction, and the cosine is NaN.
    """

    cosine: Estimate
    length: Estimate
    noise: float

    def cells(self) -> dict[str, str]:
        """A table's columns and their cells."""
        return {
            "cosine": self.cosine.text(4),
            "length": self.length.text(),
            "noise": f"{self.noise:.2f}",
            "noise / length": f"{self.noise / self.length.value:.2f}",
        }


def compare(gradients: Tensor, exact: Tensor) -> Comparison:
    gradients_RD, exact_D = gradients.flatten(1), exact.flatten()
    unit, mean_D = exact_D.norm(), gradients_RD.mean(0)
    variance = gradients_RD.var(0).sum()
    noise = (variance.sqrt() / unit).item()
    # The square of a noisy mean is too large by the variance of that mean, on average.
    surplus = variance / len(gradients_RD)
    square = mean_D.square().sum() - surplus
    if square < surplus:
        zero = Estimate(0.0, (surplus.sqrt() / unit).item())
        return Comparison(Estimate(math.nan, math.nan), zero, noise)
    length = square.sqrt()
    cosine = mean_D @ exact_D / (length * unit)
    # Standard errors by the delta method: project on the derivative of each figure.
    by_length_D = mean_D / length
    by_cosine_D = (exact_D / unit - cosine * by_length_D) / length
    cosine_error = standard_error(gradients_RD @ by_cosine_D)
    length_error = standard_error(gradients_RD @ by_length_D / unit)
    return Comparison(
        Estimate(cosine.item(), cosine_error),
        Estimate((length / unit).item(), length_error),
        noise,
    )
