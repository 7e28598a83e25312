"""Scoring a rollout with the rules of `rewards`."""

import torch
from torch import Tensor

from common.config import Config
from grpo.rollout import Rollout
from rewards import score

from .step import Verdicts


def score_rollout(rollout: Rollout) -> Verdicts:
    """The verdict of every rule on every completion."""
    verdicts_NG = []
    for prompt, texts in zip(rollout.prompts, rollout.texts, strict=True):
        verdicts_NG.append([score(text, prompt.question.answer) for text in texts])
    return verdicts_NG


def weighted_sum(verdicts_NG: Verdicts, config: Config) -> Tensor:
    """Rewards (N, G): the sum of each rule's score times its weight, `config.<rule>_weight`."""
    # Rules run on the CPU; the rewards are copied to the device once, at the end.
    rewards_NG = torch.zeros(len(verdicts_NG), len(verdicts_NG[0]))
    for n, group in enumerate(verdicts_NG):
        for g, verdicts in enumerate(group):
            for verdict in verdicts:
                rewards_NG[n, g] += getattr(config, f"{verdict.rule}_weight") * verdict.score
    return rewards_NG.to(config.device)
