"""Whole training steps, from the command line to the saved weights, against their slow twin.

The twin makes every update from its own weights and moments. It gets our sampled completions, but
nothing that was computed from them. So a fault anywhere in the training loop makes its numbers and
ours diverge, in that step and in all later ones.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from step_twin import RULES, Group, Outcome, StepTwin, rule_scores
from tiny import tiny_tokenizer
from tiny_run import VISION_TOKENS, write_run
from torch import Tensor

import train
from data import Prompt, PromptEncoder
from grpo.optimizer import MasterAdamW
from model import read_config
from model.weights import published_views
from rewards import Verdict


@dataclass
class RunOfOurs:
    """The inputs and results of a run of train.py."""

    prompts: list[Prompt] = field(default_factory=list)
    rollouts: list[Any] = field(default_factory=list)
    # One dict per update, before clipping.
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def run_ours(patch: pytest.MonkeyPatch, config: Path, folder: Path) -> RunOfOurs:
    """Run and observe train.py. Only this function and `METRICS` depend on our internals."""
    ours, generator = RunOfOurs(), torch.Generator().manual_seed(0)
    shape = read_config(folder / "base")
    sample, update, assemble = train.sample_groups, MasterAdamW.step, PromptEncoder.assemble

    def observed_sampler(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        # If sampler and trainer agreed, no test could tell which of them a number came from.
        noise_NGT = 0.2 * torch.randn(rollout.logp_NGT.shape, generator=generator)
        rollout = replace(rollout, logp_NGT=rollout.logp_NGT + noise_NGT * rollout.mask_NGT)
        ours.rollouts.append(rollout)
        return rollout

    def observed_update(optimizer, *args, **kwargs):
        grads = [master.grad for master in optimizer.masters]
        named = zip([weight.name for weight in optimizer.weights], grads, strict=True)
        gradients = {name: grad.clone() for name, grad in named if grad is not None}
        ours.gradients.append(published_views(gradients, shape))
        return update(optimizer, *args, **kwargs)

    def observed_assemble(*args, **kwargs):
        ours.prompts.append(assemble(*args, **kwargs))
        return ours.prompts[-1]

    def score(text: str, letter: str) -> tuple[Verdict, ...]:
        scores = rule_scores(text, letter)
        return tuple(Verdict(rule, score, "") for rule, score in zip(RULES, scores, strict=True))

    patch.setattr(train, "sample_groups", observed_sampler)
    patch.setattr("training.scoring.score", score)
    patch.setattr(MasterAdamW, "step", observed_update)
    patch.setattr(PromptEncoder, "assemble", observed_assemble)
    patch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    assert train.main() == 0
    ours.metrics = json_lines(folder / "run" / "metrics.jsonl")
    ours.completions = json_lines(folder / "run" / "completions.jsonl")
    ours.weights = load_file(folder / "run" / "model" / "model.safetensors")
    return ours


METRICS = {
    "equal_groups": "frac_reward_zero_std",
    "mean_length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "clipped_low": "clip_ratio/low_mean",
    "clipped_high": "clip_ratio/high_mean",
}
"""The twin's name of a statistic -> its name in metrics.jsonl, if they differ."""

KNOBS = {
    "method": "grpo",
    "sft_answer": "tags",
    "steps": 2,
    "prompts_per_step": 3,
    "group_size": 4,
    "max_new_tokens": 8,
    "micro_batch_tokens": 100_000,  # all groups at once; 600 holds two of the three, 1 holds one
    "temperature": 1.3,
    "inner_updates": 1,
    "clip_low": 0.1,
    "clip_high": 0.15,
    "beta": 0.0,
    "ratio": "token",
    "dual_clip": 0.0,
    "importance_cap": 0.0,
    "kl": "k3",
    "advantage_baseline": "mean",
    "advantage_scale": "std",
    "loss_average": "sequence",
    "mask_truncated": False,
    "length_penalty": 0.0,
    "format_weight": 2.0,
    "accuracy_weight": 0.5,
    "learning_rate": 5e-4,
    "warmup_steps": 0,
    "final_lr_ratio": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "freeze_vision": False,
}
"""The fields of a config that the twin reads, with the defaults for the settings below."""

GRPO = {
    "one update, with a reference": {
        "steps": 3,
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "beta": 0.04,
        "micro_batch_tokens": 1,
    },
    "three updates, token average, no reference": {
        "inner_updates": 3,
        "loss_average": "token",
        "advantage_scale": "none",
        "temperature": 0.8,
        "weight_decay": 0.1,
        "max_grad_norm": 0.2,
    },
    "three updates, constant average, with a reference": {
        "inner_updates": 3,
        "loss_average": "constant",
        "micro_batch_tokens": 600,
        "beta": 0.3,
        "clip_low": 0.15,
        "clip_high": 0.1,
        "adam_beta1": 0.8,
    },
    "two updates, frozen vision": {
        "seed": 5,
        "inner_updates": 2,
        "learning_rate": 1e-3,
        "micro_batch_tokens": 1,
        "beta": 0.1,
        "advantage_scale": "none",
        "freeze_vision": True,
        "final_lr_ratio": 0.1,
        "max_grad_norm": 100.0,
    },
    "groups of equal rewards, none truncated": {
        "prompts_per_step": 4,
        "group_size": 2,
        "seed": 6,
        "max_new_tokens": 60,
        "loss_average": "constant",
        "format_weight": 0.0,
    },
    "ratio of the sequence, truncated masked": {
        "seed": 1,
        "inner_updates": 3,
        "learning_rate": 1e-4,
        "ratio": "sequence",
        "clip_low": 0.04,
        "clip_high": 0.04,
        "mask_truncated": True,
        "loss_average": "token",
        "advantage_scale": "none",
        "micro_batch_tokens": 600,
    },
    "detached ratio, importance, k2, no baseline, length penalty": {
        "inner_updates": 3,
        "ratio": "detached",
        "importance_cap": 1.1,
        "beta": 0.2,
        "kl": "k2",
        "length_penalty": 0.5,
        "advantage_baseline": "none",
        "advantage_scale": "batch_std",
        "micro_batch_tokens": 1,
    },
    "dual clip, importance, k1, leave one out, truncated masked": {
        "seed": 1,
        "inner_updates": 3,
        "dual_clip": 1.05,
        "importance_cap": 1.2,
        "beta": 0.1,
        "kl": "k1",
        "advantage_baseline": "leave_one_out",
        "advantage_scale": "none",
        "loss_average": "constant",
        "mask_truncated": True,
    },
}
SFT = {
    "tags": {"steps": 4, "warmup_steps": 2, "final_lr_ratio": 0.1, "micro_batch_tokens": 1},
    "bare": {"sft_answer": "bare", "weight_decay": 0.1},
    "named": {"sft_answer": "named", "micro_batch_tokens": 600, "freeze_vision": True},
}

END_IDS = [*range(100, 150), 322]
"""So many ids that a random model ends some completions at once and others never."""

RELATIVE = 1e-4
"""Tolerance relative to a statistic, a gradient's norm, or the distance that the weights moved.
Rounding uses up to a third of it.
"""


class Pair:
    """One of our runs, and the twin's outcome of each of its steps."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, fields: dict[str, Any]) -> None:
        values = {**KNOBS, **fields}
        self.knobs = SimpleNamespace(**values)
        config = write_run(folder, test_questions=[], **values)
        ends = json.dumps({"eos_token_id": END_IDS})
        (folder / "base" / "generation_config.json").write_text(ends)
        self.base = load_file(folder / "base" / "model.safetensors")
        self.ours = run_ours(patch, config, folder)

        ids = tiny_tokenizer().convert_tokens_to_ids
        forbidden = [ids(token) for token in VISION_TOKENS.values()]
        allowed = [i for i in range(len(tiny_tokenizer())) if i not in forbidden]
        twin = StepTwin(folder / "base", allowed, END_IDS, self.knobs)
        self.outcomes = [self.twin_step(twin, step) for step in range(self.knobs.steps)]
        self.weights = twin.weights()

    def twin_step(self, twin: StepTwin, step: int) -> Outcome:
        """The twin's step on our prompts and completions."""
        N = self.knobs.prompts_per_step
        prompts = self.ours.prompts[step * N : (step + 1) * N]
        if self.knobs.method == "sft":
            return twin.sft_step(step, [group_of(prompt, [], []) for prompt in prompts])
        rollout, groups = self.ours.rollouts[step], []
        for n, prompt in enumerate(prompts):
            masks = rollout.mask_NGT[n]
            completions = [
                o[mask].tolist() for o, mask in zip(rollout.tokens_NGT[n], masks, strict=True)
            ]
            logps = [logp[mask] for logp, mask in zip(rollout.logp_NGT[n], masks, strict=True)]
            groups.append(group_of(prompt, completions, logps))
        return twin.grpo_step(step, groups)


def group_of(prompt: Prompt, completions: list[list[int]], logps: list[Tensor]) -> Group:
    """One of our prompts and its completions, in the form that the twin takes."""
    question = prompt.question
    return Group(
        prompt=prompt.tokens_P.tolist(),
        patches=prompt.patches_SC,
        grids=prompt.grids_I3,
        letter=question.answer,
        option=question.options["ABCDEFGHIJ".index(question.answer)],
        completions=completions,
        sampled_logps=logps,
    )


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module", params=GRPO)
def grpo(request, tmp_path_factory) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        return Pair(patch, tmp_path_factory.mktemp("grpo"), GRPO[request.param])


@pytest.fixture(scope="module", params=SFT)
def sft(request, tmp_path_factory) -> Pair:
    fields = {"method": "sft", **SFT[request.param]}
    with pytest.MonkeyPatch.context() as patch:
        return Pair(patch, tmp_path_factory.mktemp("sft"), fields)


def test_the_rollouts_contain_every_case_to_compare(grpo):
    """Otherwise the tests below could pass without comparing anything."""
    limit = grpo.knobs.max_new_tokens
    lengths = [length for outcome in grpo.outcomes for length in outcome.lengths]
    assert 1 in lengths and any(1 < length < limit for length in lengths)
    if grpo.knobs.dual_clip:
        assert any(outcome.dual_clipped for outcome in grpo.outcomes)
    for outcome in grpo.outcomes:
        if limit == KNOBS["max_new_tokens"]:
            assert 0 < outcome.metrics["truncated"] < 1
        else:  # the constant average must use the limit, not the longest completion
            assert max(outcome.lengths) < limit
        if grpo.knobs.inner_updates > 1:
            assert outcome.clipped_below and outcome.clipped_above
            clipped = outcome.metrics["clipped_low"] + outcome.metrics["clipped_high"]
            assert 0.05 < clipped < 0.95
            assert outcome.ratio_margin > 1e-5  # rounding can't decide whether a token is clipped
        if grpo.knobs.importance_cap:
            assert 0 < outcome.capped < grpo.knobs.inner_updates * sum(outcome.lengths)
        if not grpo.knobs.format_weight:
            assert 0 < outcome.metrics["equal_groups"] < 1


def test_texts_rewards_and_advantages_are_those_of_the_twin(grpo):
    rows = iter(grpo.ours.completions)
    for step, outcome in enumerate(grpo.outcomes):
        for n, texts in enumerate(outcome.texts):
            for g, text in enumerate(texts):
                row = next(rows)
                assert (row["step"], row["completion"]) == (step, text)
                scores = [row["rewards"][rule]["score"] for rule in RULES]
                assert scores == pytest.approx(outcome.scores[n][g], rel=1e-6)
                expected = outcome.advantages[n][g]
                assert row["advantage"] == pytest.approx(expected, rel=RELATIVE, abs=1e-6)
    assert not list(rows)


def test_every_statistic_of_grpo_is_the_twins(grpo):
    assert_same_statistics(grpo)
    for row, outcome in zip(grpo.ours.metrics, grpo.outcomes, strict=True):
        tokens = row["tokens_per_second"] * row["seconds"]
        assert tokens == pytest.approx(sum(outcome.lengths))


def test_the_gradient_of_every_grpo_update_is_that_of_equation_3(grpo):
    assert_same_gradients(grpo)


def test_the_weights_after_grpo_are_those_of_plain_adamw(grpo):
    assert_same_weights(grpo)


def test_every_statistic_of_sft_is_the_twins(sft):
    assert_same_statistics(sft)


def test_the_gradient_of_every_sft_update_is_that_of_cross_entropy(sft):
    assert_same_gradients(sft)


def test_the_weights_after_sft_are_those_of_plain_adamw(sft):
    assert_same_weights(sft)


def assert_same_statistics(pair: Pair) -> None:
    """Compare every number in metrics.jsonl except times."""
    for step, (row, outcome) in enumerate(zip(pair.ours.metrics, pair.outcomes, strict=True)):
        expected = {METRICS.get(name, name): value for name, value in outcome.metrics.items()}
        expected["step"] = step
        numbers = {name: value for name, value in row.items() if "second" not in name}
        lost, twins_lost = numbers.pop("bf16_lost"), expected.pop("bf16_lost")
        assert numbers == pytest.approx(expected, rel=RELATIVE, abs=2e-7)
        assert lost == pytest.approx(twins_lost, abs=0.02)  # ours samples the weights


def assert_same_gradients(pair: Pair) -> None:
    """Compare every tensor of every update."""
    expected = [gradients for outcome in pair.outcomes for gradients in outcome.gradients]
    for gradients, twins in zip(pair.ours.gradients, expected, strict=True):
        assert gradients.keys() == twins.keys()
        for name, twin in twins.items():
            assert twin.norm() > 0, name
            assert (gradients[name] - twin).norm() < RELATIVE * twin.norm(), name


def assert_same_weights(pair: Pair) -> None:
    """Compare the weights, relative to how far they moved, which is a small distance.

    AdamW can turn the rounding error of a gradient near 0 into a whole update. So a few weights may
    differ by more, but neither the median of a tensor nor the sum over the model.
    """
    assert pair.ours.weights.keys() == pair.weights.keys()
    all_moved = all_errors = 0.0
    for name, twin in pair.weights.items():
        moved = (twin - pair.base[name]).abs()
        error = (pair.ours.weights[name] - twin).abs()
        if pair.knobs.freeze_vision and name.startswith("visual."):
            assert moved.max() == error.max() == 0, name
            continue
        assert (error / moved)[moved > 0].median() < RELATIVE, name
        all_moved += moved.sum().item()
        all_errors += error.sum().item()
    assert all_errors < RELATIVE * all_moved
