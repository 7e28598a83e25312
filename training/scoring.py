"""Scoring a rollout: the rules of `rewards`, their weights, and what the config does with them."""

from itertools import chain

import torch
from torch import Tensor

from common.config import Config
from grpo.rollout import Rollout, informative_groups
from rewards import score

from .step import Step, Verdicts


def score_rollout(step: Step, rollout: Rollout, config: Config) -> tuple[Rollout, Verdicts, Tensor]:
    """The rollout's groups with the rules' verdicts and the rewards (N, G), from here on those of
    all processes.

    If the step has spare groups, N of its groups are kept. Metrics: "replaced_groups", the number
    of spare ones among them, and "frac_kept_zero_std", the share whose scores are all equal.
    """
    own_verdicts = []
    for prompt, texts in zip(rollout.prompts, rollout.texts, strict=True):
        own_verdicts.append([score(text, prompt.question.answer) for text in texts])
    rollout, verdicts_NG = step.ranks.whole(rollout, own_verdicts)
    scores_NG = rewards_NG = weighted_sum(verdicts_NG, config)
    if config.length_penalty:
        lengths_NG, limit = rollout.mask_NGT.sum(-1), config.max_new_tokens
        rewards_NG = scores_NG - length_penalty(lengths_NG, limit, config.length_penalty)
    # What the policy does is measured on all groups: those that are kept are no fair sample.
    step.stats |= sample_metrics(rollout, verdicts_NG, rewards_NG)
    if config.oversampling > 1:
        # Without the penalty, as in DAPO: lengths alone do not make a group informative.
        kept = informative_groups(scores_NG, config.prompts_per_step)
        step.stats["replaced_groups"] = float(sum(n >= config.prompts_per_step for n in kept))
        step.stats["frac_kept_zero_std"] = _equal(scores_NG[kept]).float().mean()
        verdicts_NG = [verdicts_NG[n] for n in kept]
        rollout, rewards_NG = rollout.select(kept), rewards_NG[kept]
    return rollout, verdicts_NG, rewards_NG


def sample_metrics(
    rollout: Rollout, verdicts_NG: Verdicts, rewards_NG: Tensor
) -> dict[str, Tensor | float]:
    """Rewards and lengths: means over completions or over groups. Names follow TRL where the
    meaning is the same.
    """
    metrics: dict[str, Tensor | float] = {
        "reward": rewards_NG.mean(),
        "reward_std": rewards_NG.std(-1).mean(),
        "frac_reward_zero_std": _equal(rewards_NG).float().mean(),
        "completions/mean_length": rollout.mask_NGT.sum(-1).float().mean(),
        "completions/clipped_ratio": 1 - rollout.ended_NG.float().mean(),
    }
    # Every completion has one verdict of each rule, in the same order.
    for verdicts in zip(*chain.from_iterable(verdicts_NG), strict=True):
        total = sum(verdict.score for verdict in verdicts)
        metrics[f"rewards/{verdicts[0].rule}"] = total / len(verdicts)
    return metrics


def _equal(rewards_NG: Tensor) -> Tensor:
    return rewards_NG.amax(-1) == rewards_NG.amin(-1)


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
    zone = max(1.0, limit * share)  # at least a token: a shorter one penalises the same lengths
    # Exactly 1 at the limit: rounded, it would make rewards differ that are equal.
    return (1 - (limit - lengths_NG) / zone).clamp(0, 1)
