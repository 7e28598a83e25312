"""Group-relative advantages: closed forms and invariances."""

from types import SimpleNamespace

import pytest
import torch

from grpo.advantages import BASELINES, SCALES, group_advantages
from rewards import Verdict
from training.scoring import weighted_sum

REWARDS = torch.tensor(
    [[2.0, 0.0, 1.0, 1.0], [0.0, 0.5, 2.0, 1.5], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64
)


def test_advantages_equal_numbers_worked_by_hand():
    # Rewards 2, 0, 1, 1: mean 1, squared deviations 1 + 1 + 0 + 0, sample variance 2/3.
    expected = torch.tensor([[1.0, -1.0, 0.0, 0.0]]) / (2 / 3) ** 0.5
    torch.testing.assert_close(group_advantages(torch.tensor([[2.0, 0.0, 1.0, 1.0]])), expected)
    torch.testing.assert_close(
        group_advantages(torch.tensor([[1.0, 0.0]])), torch.tensor([[0.5**0.5, -(0.5**0.5)]])
    )


def test_without_scaling_advantages_are_the_centred_rewards():
    torch.testing.assert_close(
        group_advantages(torch.tensor([[2.0, 0.0, 1.0, 1.0]]), scale="none"),
        torch.tensor([[1.0, -1, 0, 0]]),
    )


@pytest.mark.parametrize("shift", [-3.0, 0.1, 100.0])
@pytest.mark.parametrize("factor", [1e-6, 0.3, 1e6])
def test_shift_and_positive_scale_of_the_rewards_leave_advantages_unchanged(shift, factor):
    torch.testing.assert_close(
        group_advantages(REWARDS * factor + shift * factor), group_advantages(REWARDS)
    )


@pytest.mark.filterwarnings("error")  # torch warns of a sample of one
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 2.0, 1e8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_a_group_of_equal_rewards_gives_exact_zeros_not_nan_and_not_rounding_noise(value, size):
    assert torch.equal(group_advantages(torch.full((2, size), value)), torch.zeros(2, size))


def test_permuting_a_group_permutes_its_advantages_and_groups_do_not_mix():
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        group_advantages(REWARDS[:, order]), group_advantages(REWARDS)[:, order]
    )
    torch.testing.assert_close(group_advantages(REWARDS[0]), group_advantages(REWARDS)[0])
    for row in range(len(REWARDS)):
        torch.testing.assert_close(
            group_advantages(REWARDS[row : row + 1]), group_advantages(REWARDS)[row : row + 1]
        )


def test_advantages_have_mean_zero_and_unit_variance_in_each_group():
    advantages = group_advantages(REWARDS)
    torch.testing.assert_close(advantages.mean(-1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(advantages.var(-1), torch.ones(3, dtype=torch.float64))


def test_the_rewards_given_are_not_changed_and_half_precision_is_computed_in_fp32():
    rewards = REWARDS.to(torch.bfloat16)
    before = rewards.clone()
    assert group_advantages(rewards).dtype == torch.float32
    assert torch.equal(rewards, before)


@pytest.mark.parametrize("knob", ["baseline", "scale"])
def test_an_unknown_baseline_or_scale_is_an_error(knob):
    with pytest.raises(ValueError, match="'max' is none of"):
        group_advantages(REWARDS, **{knob: "max"})


def test_leave_one_out_compares_each_reward_with_the_mean_of_the_others():
    # Rewards 2, 0, 1, 1: the others' means are 2/3, 4/3, 1 and 1.
    rewards = torch.tensor([[2.0, 0.0, 1.0, 1.0]])
    centred = torch.tensor([[4 / 3, -4 / 3, 0.0, 0.0]])
    advantages = group_advantages(rewards, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(advantages, centred)
    # The scale is that of the rewards, whatever the baseline.
    advantages = group_advantages(rewards, baseline="leave_one_out", scale="std")
    torch.testing.assert_close(advantages, centred / (2 / 3) ** 0.5)


@pytest.mark.parametrize("scale", SCALES)
def test_leave_one_out_is_the_groups_mean_times_G_over_G_minus_1(scale):
    for size in (2, 3, 4):
        rewards = REWARDS[:, :size]
        expected = group_advantages(rewards, scale=scale) * size / (size - 1)
        advantages = group_advantages(rewards, baseline="leave_one_out", scale=scale)
        torch.testing.assert_close(advantages, expected)


def test_without_a_baseline_advantages_are_the_rewards_and_equal_ones_still_count():
    rewards = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert torch.equal(group_advantages(rewards, baseline="none", scale="none"), rewards)
    # Mean 1, squared deviations 1 + 1 + 0 + 0, sample variance 2/3.
    advantages = group_advantages(rewards, baseline="none", scale="batch_std")
    torch.testing.assert_close(advantages, rewards / (2 / 3) ** 0.5)


def test_batch_std_divides_all_groups_by_the_standard_deviation_of_all_rewards():
    # Mean 1.5, squared deviations 0.25 + 2.25 + 2.25 + 0.25, sample variance 5/3; group means 1, 2.
    rewards = torch.tensor([[2.0, 0.0], [3.0, 1.0]])
    expected = torch.tensor([[1.0, -1.0], [1.0, -1.0]]) / (5 / 3) ** 0.5
    torch.testing.assert_close(group_advantages(rewards, scale="batch_std"), expected)
    # A single group is a batch.
    single = group_advantages(REWARDS[:1], scale="batch_std")
    torch.testing.assert_close(single, group_advantages(REWARDS[:1], scale="std"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_group_of_equal_rewards_gives_exact_zeros_whatever_the_knobs(baseline, scale, size):
    rewards = torch.full((2, size), 0.1)
    knobs = {"baseline": baseline, "scale": scale}
    assert torch.equal(group_advantages(rewards, **knobs), torch.zeros(2, size))
    rewards[1] = torch.arange(size)  # its neighbour does not change that
    assert torch.equal(group_advantages(rewards, **knobs)[0], torch.zeros(size))


@pytest.mark.filterwarnings("error")
def test_a_batch_of_equal_rewards_is_not_divided_by_zero():
    for rewards in (torch.full((2, 3), 0.1), torch.full((1, 1), 0.1)):
        assert torch.equal(group_advantages(rewards, baseline="none", scale="batch_std"), rewards)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_the_order_of_groups_and_completions_does_not_matter(baseline, scale):
    knobs = {"baseline": baseline, "scale": scale}
    groups, order = torch.tensor([2, 0, 1]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        group_advantages(REWARDS[groups][:, order], **knobs),
        group_advantages(REWARDS, **knobs)[groups][:, order],
    )


def test_rewards_of_a_single_group_are_the_weighted_scores_on_the_runs_device():
    verdicts_NG = [[(Verdict("format", 1.0, ""), Verdict("accuracy", 0.5, ""))] * 3]
    config = SimpleNamespace(format_weight=0.25, accuracy_weight=2.0, device="cpu")
    assert torch.equal(weighted_sum(verdicts_NG, config), torch.full((1, 3), 1.25))
    config.device = "meta"  # stands for a GPU
    assert weighted_sum(verdicts_NG, config).device.type == "meta"
