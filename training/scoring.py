"""Scoring a rollout: the rules of `rewards`, their weights, and what the config does with them."""

import torch
from torch import Tensor

from common.config import Config
from grpo.rollout import Rollout, informative_groups
from rewards import score

from .step import Step, Verdicts


def score_rollout(step: Step, rollout: Rollout, config: Config) -> tuple[Rollout, Verdicts, Tensor]:
    """The rollout's groups with the rules' verdicts and the rewards (N, G).

    If the step has spare groups, N of its groups are kept; the metric "replaced_groups" counts the
    groups of equal rewards that gave way to a spare one.
    """
    verdicts_NG = []
    for prompt, texts in zip(rollout.prompts, rollout.texts, strict=True):
        verdicts_NG.append([score(text, prompt.question.answer) for text in texts])
    rewards_NG = weighted_sum(verdicts_NG, config)
    if config.length_penalty:
        lengths_NG, limit = rollout.mask_NGT.sum(-1), config.max_new_tokens
        rewards_NG = rewards_NG - length_penalty(lengths_NG, limit, config.length_penalty)
    if config.oversampling > 1:
        kept = informative_groups(rewards_NG, config.prompts_per_step)
        step.stats["replaced_groups"] = float(sum(n >= config.prompts_per_step for n in kept))
        verdicts_NG = [verdicts_NG[n] for n in kept]
        rollout, rewards_NG = rollout.select(kept), rewards_NG[kept]
    return rollout, verdicts_NG, rewards_NG


def weighted_sum(verdicts_NG: Verdicts, config: Config) -> Tensor:
    """Rewards (N, G): the sum of each rule's score times its weight, `config.<rule>_weight`."""
    # Rules run on the CPU; the rewards are copied to the device once, at the end.
    rewards_NG = torch.zeros(len(verdicts_NG), len(verdicts_NG[0]))
    for n, group in enumerate(verdicts_NG):
        for g, verdicts in enumerate(group):
            for verdict in verdicts:
                rewards_NG[n, g] += getattr(config, f"{verdict.rule}_weight") * verdict.score
    return rewards_NG.to(config.device)


def length_penalty(lengths_NG: Tensor, limit: int, share: float) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), from 0 to 1: it rises
    linearly over the last `share` of the `limit`.

    Unlike the limit alone, it tells a completion that is nearly too long from a short one.
    """
    start = limit * (1 - share)
    return ((lengths_NG - start) / (limit - start)).clamp(0, 1)
