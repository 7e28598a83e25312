"""Values of another trainer: losses, gradients and advantages that TRL 1.16.0 gives.

TRL is not a dependency. The numbers below were recorded by running, in float64, its own
`GRPOTrainer._compute_loss` (its model call replaced by LOGP) and the lines of
`_generate_and_score_completions` of its GRPO and RLOO trainers that make importance weights and
advantages.
"""

from typing import Any

import pytest
import torch

from grpo.advantages import group_advantages
from grpo.loss import grpo_loss, token_weights, truncated_importance


def tensor(rows: list) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Four completions of 3, 1, 2 and 3 tokens. Ratios e^(LOGP - OLD) lie on both sides of both clips.
LOGP = tensor([[-0.9, -1.6, -0.4], [-1.2, 0.0, 0.0], [-2.1, -0.7, 0.0], [-0.5, -1.1, -1.9]])
OLD = tensor([[-1.3, -1.1, -0.5], [-0.8, 0.0, 0.0], [-1.4, -1.7, 0.0], [-2.4, -0.9, -1.5]])
REF = tensor([[-1.0, -1.4, -0.9], [-1.0, 0.0, 0.0], [-1.7, -0.8, 0.0], [-0.9, -1.6, -1.2]])
SAMPLED = tensor([[-1.5, -1.0, -0.5], [-1.9, 0.0, 0.0], [-1.3, -2.6, 0.0], [-2.2, -0.9, -1.8]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
ADVANTAGES = tensor([1.25, -0.75, 0.5, -1.5])
CLIP = {"clip_low": 0.2, "clip_high": 0.28}

# TRL's settings -> (our average, our knobs, loss, gradient). beta is 0.04 and epsilon 0.2 and 0.28,
# unless stated otherwise; max_completion_length is 5.
TRL: dict[str, tuple[str, dict[str, Any], float, list]] = {
    "loss_type=grpo": (
        "sequence",
        CLIP,
        0.768181239,
        [
            [0.000317209, -0.063918286, -0.113810406],
            [-0.002214028, 0.0, 0.0],
            [-0.033495705, 0.000475813, 0.0],
            [0.836835738, 0.103652909, -0.003379176],
        ],
    ),
    # bnpo averages over the tokens of a micro-batch, dapo over those of the step: here the same.
    "loss_type=bnpo and loss_type=dapo": (
        "token",
        CLIP,
        0.939852859,
        [
            [0.000422945, -0.085224382, -0.151747208],
            [-0.000984012, 0.0, 0.0],
            [-0.029773960, 0.000422945, 0.0],
            [1.115780985, 0.138203878, -0.004505568],
        ],
    ),
    "loss_type=dr_grpo": (
        "constant",
        CLIP,
        0.422933787,
        [
            [0.000190325, -0.038350972, -0.068286244],
            [-0.000442806, 0.0, 0.0],
            [-0.013398282, 0.000190325, 0.0],
            [0.502101443, 0.062191745, -0.002027505],
        ],
    ),
    # TRL's epsilon_high is the upper bound itself, and there is no lower one.
    "loss_type=cispo, epsilon_high=1.5": (
        "token",
        {"ratio": "detached", "clip_low": 1.0, "clip_high": 0.5},
        -0.052176024,
        [
            [-0.206774930, -0.085224382, -0.151747208],
            [0.054875992, 0.0, 0.0],
            [-0.029773960, -0.082910389, 0.0],
            [0.251465244, 0.138203878, 0.107214440],
        ],
    ),
    "loss_type=grpo, importance_sampling_level=sequence, epsilon=0.05, epsilon_high=0.06": (
        "sequence",
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.06},
        0.314296602,
        [
            [-0.103849458, -0.104904676, -0.102855102],
            [-0.002214028, 0.0, 0.0],
            [-0.002459123, 0.000475813, 0.0],
            [0.193897716, 0.194110348, 0.189419607],
        ],
    ),
    # TRL bounds the ratio, we the surrogate: the same as long as delta is above 1 + epsilon_high.
    "loss_type=grpo, delta=3": (
        "sequence",
        {**CLIP, "dual_clip": 3.0},
        0.307444434,
        [
            [0.000317209, -0.063918286, -0.113810406],
            [-0.002214028, 0.0, 0.0],
            [-0.033495705, 0.000475813, 0.0],
            [0.001098933, 0.103652909, -0.003379176],
        ],
    ),
    "loss_type=dapo, vllm_importance_sampling_mode=token_truncate, clip_max=2": (
        "token",
        {**CLIP, "importance": truncated_importance(OLD, SAMPLED, MASK, 2.0)},
        0.751346474,
        [
            [0.000422945, -0.077207851, -0.151747208],
            [-0.000984012, 0.0, 0.0],
            [-0.027148608, 0.000422945, 0.0],
            [0.913789810, 0.138203878, -0.004505568],
        ],
    ),
}


@pytest.mark.parametrize("settings", TRL)
def test_loss_and_gradient_are_those_of_trl(settings):
    average, knobs, expected, gradient = TRL[settings]
    logp = LOGP.clone().requires_grad_()
    weights = token_weights(MASK, average=average, max_new_tokens=5, dtype=torch.float64)
    loss, _ = grpo_loss(logp, OLD, REF, ADVANTAGES, MASK, beta=0.04, weights=weights, **knobs)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-8)
    torch.testing.assert_close(logp.grad, tensor(gradient), rtol=0, atol=1e-8)


def test_statistics_over_tokens_are_those_of_trl():
    weights = token_weights(MASK, average="token", dtype=torch.float64)
    _, stats = grpo_loss(LOGP, OLD, REF, ADVANTAGES, MASK, weights=weights, **CLIP)
    assert stats["kl"].item() == pytest.approx(0.082382125, abs=1e-8)
    assert stats["clip_ratio/low_mean"].item() == pytest.approx(2 / 9)
    assert stats["clip_ratio/high_mean"].item() == pytest.approx(2 / 9)


# num_generations=4
REWARDS = tensor([[2.0, 0.5, 1.0, 0.0], [1.5, 0.25, 1.75, 1.0]])
# TRL divides by the standard deviation plus this, we by the standard deviation alone. One factor of
# its standard deviation is rounded to fp32.
EPSILON = 1e-4


def test_advantages_divided_by_the_groups_standard_deviation_are_those_of_trl():
    trl = tensor(
        [
            [1.317310811, -0.439103604, 0.146367868, -1.024575075],
            [0.566861000, -1.322675666, 0.944768333, -0.188953667],
        ]
    )
    deviations = REWARDS.std(-1, keepdim=True)
    ours = group_advantages(REWARDS, scale="std") * deviations / (deviations + EPSILON)
    torch.testing.assert_close(ours, trl, rtol=0, atol=1e-7)


def test_advantages_divided_by_the_batchs_standard_deviation_are_those_of_trl():
    trl = tensor(
        [
            [1.563101505, -0.521033835, 0.173677945, -1.215745615],
            [0.521033835, -1.215745615, 0.868389725, -0.173677945],
        ]
    )
    deviation = REWARDS.std()
    ours = group_advantages(REWARDS, scale="batch_std") * deviation / (deviation + EPSILON)
    torch.testing.assert_close(ours, trl, rtol=0, atol=1e-7)


def test_advantages_without_scaling_are_those_of_trl():
    trl = tensor([[1.125, -0.375, 0.125, -0.875], [0.375, -0.875, 0.625, -0.125]])
    torch.testing.assert_close(group_advantages(REWARDS, scale="none"), trl)


def test_leave_one_out_advantages_are_those_of_trls_rloo_trainer():
    trl = tensor([[1.5, -0.5, 1 / 6, -7 / 6], [0.5, -7 / 6, 5 / 6, -1 / 6]])
    ours = group_advantages(REWARDS, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(ours, trl)
