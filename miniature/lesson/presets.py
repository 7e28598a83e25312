"""The presets of configs/presets/, trained from the same start, many runs at once."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap

from common.command_line import PRESETS
from common.config import Config, read_toml
from grpo.optimizer import MasterAdamW, scheduled_rate

from .gradient import keep_informative, sample_groups, standard_error, step_loss
from .measurements import START, TABLE, Lesson, Panel, Points, with_error
from .policy import QUESTIONS, expected_reward

TRAINING = replace(
    TABLE,
    steps=150,
    learning_rate=0.03,
    max_grad_norm=1e9,  # off: the runs share an optimiser, and the norm would tie them together
)
STEPS_SHOWN = (25, 50, 100, 150)


def configs() -> dict[str, Config]:
    """The presets, and two controls."""
    named = {}
    for file in sorted(PRESETS.glob("*.toml")):
        named[file.stem] = replace(TRAINING, **read_toml(file))  # TRAINING has GRPO's knobs
    # Some presets update twice per rollout; DAPO's also changes the reward.
    named["grpo, two updates"] = replace(named["grpo"], inner_updates=2)
    named["dapo, no length penalty"] = replace(named["dapo"], length_penalty=0.0)
    return named


def train(config: Config, runs: int) -> Tensor:
    """The expected reward before each step, and at the end, of each run: (steps + 1, R)."""
    logits_RQPV = START.repeat(runs, 1, 1, 1).float()
    policies = nn.ParameterList([logits_RQPV])  # a module, as the optimiser wants it
    optimizer = MasterAdamW(policies, config)
    step_losses = vmap(partial(step_loss, ref_QPV=START.float(), config=config))
    generator = torch.Generator().manual_seed(config.seed)
    rewards = []
    for step in range(config.steps):
        old_RQPV = policies[0].detach().clone()
        rewards.append(expected_reward(old_RQPV))
        count = config.questions_per_step
        questions_N = (step * count + torch.arange(count)) % len(QUESTIONS)  # in turn
        questions_RN = questions_N.expand(runs, -1)
        groups = sample_groups(old_RQPV, questions_RN, config.group_size, generator)
        groups = keep_informative(groups, config)
        for _ in range(config.inner_updates):
            losses_R, _ = step_losses(policies[0], groups, old_RQPV)
            losses_R.sum().backward()  # no run's loss depends on another's policy
            optimizer.step(scheduled_rate(step, config))
    rewards.append(expected_reward(policies[0].detach()))
    return torch.stack(rewards)


def presets(runs: int) -> Lesson:
    """The expected reward, computed and not sampled. grpo, dr_grpo and rloo learn alike, because
    AdamW removes the lengths of their gradients. The others have two updates per rollout: compare
    grpo with two. GSPO's bounds take part of the second away. DAPO's length penalty punishes every
    completion of three tokens, right ones too; without it dapo is the fastest.
    """
    rows = []
    lines: dict[int, dict[str, Points]] = {1: {}, 2: {}}
    for name, config in configs().items():
        rewards_SR = train(config, runs)
        row = [name, str(config.inner_updates)]
        for step in STEPS_SHOWN:
            row.append(with_error(rewards_SR[step].mean().item(), standard_error(rewards_SR[step])))
        rows.append(row)
        if "penalty" not in name:  # no room for all
            means = rewards_SR.mean(-1).tolist()
            points = [(float(step), mean) for step, mean in enumerate(means)]
            lines[config.inner_updates][name] = points
    title = "Expected reward, {}"
    panels = (
        Panel(title.format("one update"), "step", lines[1], top=1.0, labels_below=True),
        Panel(title.format("two updates"), "step", lines[2], top=1.0, labels_below=True),
    )
    return Lesson(("preset", "updates", *(f"step {step}" for step in STEPS_SHOWN)), rows, panels)
