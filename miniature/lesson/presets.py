"""The presets of configs/presets/, trained from the same start, many runs at once."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap

from common.command_line import PRESETS
from common.config import Config, read_toml
from grpo.optimizer import MasterAdamW, scheduled_rate

from .gradient import compare, keep_informative, mean_of, sample_groups, step_gradients, step_loss
from .measurements import EXACT, UNBIASED, Lesson, Points, draw, sample_steps
from .policy import QUESTIONS, START, expected_reward

TRAINING = replace(
    UNBIASED,
    steps=150,
    learning_rate=0.03,
    max_grad_norm=1e9,  # off: the runs share an optimiser, and the norm would tie them together
)
STEPS_SHOWN = (25, 50, 100, 150)


def configs() -> dict[str, Config]:
    """The presets, and controls that leave out what is not in the loss."""
    grpo, named = read_toml(PRESETS / "grpo.toml"), {}  # grpo.toml has every knob
    for file in sorted(PRESETS.glob("*.toml")):
        named[file.stem] = replace(TRAINING, **(grpo | read_toml(file)))
    # Some presets update twice per rollout without a KL term; DAPO's also samples more.
    named["grpo, two updates, beta = 0"] = replace(named["grpo"], inner_updates=2, beta=0.0)
    named["dapo, no penalty"] = replace(named["dapo"], length_penalty=0.0)
    named["dapo, no penalty, no spares"] = replace(named["dapo, no penalty"], oversampling=1.0)
    return named


def gradients_of_presets(replicates: int) -> Lesson:
    """The gradient before any update, so that every ratio is 1 and the KL term 0, without spare
    questions. What turns it is the sequence average, far more than the std, and DAPO's length
    penalty, which is another reward.
    """
    rows, groups = [], sample_steps(TRAINING.group_size, replicates)
    for name, config in configs().items():
        if "," not in name or name == "dapo, no penalty":  # the first of two updates is the same
            gradients, _ = step_gradients(config, groups)
            rows.append({"preset": name, **compare(gradients, EXACT).cells()})
    return rows, []


def train(config: Config, runs: int) -> Tensor:
    """The expected reward before each step, and at the end, of each run: (steps + 1, R)."""
    logits_RQPV = START.repeat(runs, 1, 1, 1).float()
    policies = nn.ParameterList([logits_RQPV])  # a module, as the optimiser wants it
    optimizer = MasterAdamW(policies, config)
    step_losses = vmap(partial(step_loss, config=config))
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
    AdamW removes the lengths of their gradients. The others have two updates per rollout and no KL
    term: compare grpo with the same. CISPO's bound and DAPO's higher clip are idle here. GSPO's
    bounds take nearly all of the second update away. DAPO's length penalty punishes every
    completion of three tokens, right ones too; without it, what is left of its lead is that of the
    spare groups.
    """
    rows = []
    curves: dict[int, dict[str, Points]] = {1: {}, 2: {}}
    for name, config in configs().items():
        rewards_SR = train(config, runs)
        row = {"preset": name, "updates": str(config.inner_updates)}
        for step in STEPS_SHOWN:
            row[f"step {step}"] = mean_of(rewards_SR[step]).text()
        rows.append(row)
        if "no " not in name:  # no room for all
            curves[config.inner_updates][name] = list(enumerate(rewards_SR.mean(-1).tolist()))
    panels = []
    for updates, lines in (("one update", curves[1]), ("two updates", curves[2])):
        title = f"Expected reward, {updates}"
        panels.append(draw(title, "step", lines, top=1.0, labels_below=True))
    return rows, panels
