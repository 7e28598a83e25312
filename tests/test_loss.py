"""The clipped loss with KL: hand-computed values, gradients by finite differences, invariance to
splitting.
"""

import dataclasses
import math

import pytest
import torch

from common.config import Config
from grpo.loss import grpo_loss, kl_estimate, token_weights

FULL = torch.ones(1, 1, 1, dtype=torch.bool)


def one(x: float) -> torch.Tensor:
    return torch.tensor([[[x]]], dtype=torch.float64)


def loss_of_one_token(ratio: float, advantage: float, ref_ratio: float = 1.0, beta: float = 0.0):
    """Loss of a single token whose pi_theta / pi_old is `ratio` and whose pi_ref / pi_theta is
    `ref_ratio`.
    """
    logp = one(math.log(ratio) - 1.0)
    return grpo_loss(
        logp,
        one(-1.0),
        logp + math.log(ref_ratio),
        one(advantage)[..., 0],
        FULL,
        clip_low=0.2,
        clip_high=0.3,
        beta=beta,
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.2, 2.0, -2.4, 0),
        (1.5, 2.0, -2.6, 1),  # a good token that is likely enough: clipped at 1 + clip_high
        (0.5, 2.0, -1.0, 0),  # a good token that became rarer is always pulled back
        (0.5, -2.0, 1.6, 1),  # a bad token that is rare enough: clipped at 1 - clip_low
        (1.5, -2.0, 3.0, 0),
        (0.9, -2.0, 1.8, 0),
    ],
)
def test_surrogate_takes_the_pessimistic_side_of_the_clip(ratio, advantage, expected, clipped):
    loss, stats = loss_of_one_token(ratio, advantage)
    assert loss.item() == pytest.approx(expected)
    assert stats["clip_ratio/low_mean"].item() == (clipped and ratio < 1)
    assert stats["clip_ratio/high_mean"].item() == (clipped and ratio > 1)
    assert stats["ratio"].item() == pytest.approx(ratio)


def test_kl_term_is_the_k3_estimate_of_equation_4():
    loss, stats = loss_of_one_token(1.0, 0.0, ref_ratio=2.0, beta=0.5)
    assert stats["kl"].item() == pytest.approx(2 - math.log(2) - 1)
    assert loss.item() == pytest.approx(0.5 * (1 - math.log(2)))


def test_k3_is_an_unbiased_and_non_negative_estimate_of_the_divergence():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    estimates = kl_estimate(policy, reference)
    assert (estimates >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimates).sum(), exact)


def batch(dtype=torch.float64):
    """Three groups of two completions of 1 to 5 tokens, with arbitrary numbers in the padding."""
    torch.manual_seed(1)
    lengths = torch.tensor([[5, 1], [3, 4], [2, 2]])
    mask = torch.arange(5) < lengths[..., None]
    logp, old, ref = -torch.rand(3, 3, 2, 5, dtype=dtype) - 0.1
    return logp.requires_grad_(), old, ref, torch.randn(3, 2, dtype=dtype), mask


SETTINGS = {"clip_low": 0.2, "clip_high": 0.28, "beta": 0.04}


def test_sequence_average_is_equation_3_summed_by_hand():
    leaf, old, ref, advantages, mask = batch()
    logp, total = leaf.detach(), 0.0
    for n in range(3):
        for g in range(2):
            length = int(mask[n, g].sum())
            for t in range(length):
                ratio = math.exp(logp[n, g, t] - old[n, g, t])
                a, r = advantages[n, g].item(), (ref - logp)[n, g, t].item()
                surrogate = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
                total -= (surrogate - 0.04 * (math.exp(r) - r - 1)) / length / 6
    assert grpo_loss(logp, old, ref, advantages, mask, **SETTINGS)[0].item() == pytest.approx(total)


def test_weights_of_the_three_averages_by_hand():
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]], dtype=torch.bool)
    assert token_weights(mask[..., :2], average="constant", max_new_tokens=3)[
        0, 0, 0
    ] == pytest.approx(1 / 6)
    for average, expected in {
        "sequence": [[0.25, 0.25, 0.0], [0.5, 0.0, 0.0]],
        "token": [[1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0]],
        "constant": [[1 / 6, 1 / 6, 0.0], [1 / 6, 0.0, 0.0]],
    }.items():
        torch.testing.assert_close(
            token_weights(mask, average=average, max_new_tokens=3), torch.tensor([expected])
        )
    for average in ("mean", "constant"):  # the constant is missing
        with pytest.raises(ValueError, match="'sequence', 'token' or"):
            token_weights(mask, average=average)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_a_step_of_a_single_token_has_weight_one_and_one_without_tokens_none(average):
    assert token_weights(FULL, average=average) == 1
    assert token_weights(~FULL, average=average) == 0


def test_gradient_agrees_with_finite_differences_in_float64():
    logp, old, ref, advantages, mask = batch()
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, ref, advantages, mask, **SETTINGS)[0], (logp,)
    )


def test_at_the_sampling_policy_the_gradient_is_that_of_the_plain_policy_gradient():
    logp, _, _, advantages, mask = batch()
    loss, stats = grpo_loss(
        logp, logp.detach(), None, advantages, mask, clip_low=0.2, clip_high=0.2, beta=0.0
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, (-token_weights(mask) * advantages[..., None]).double())
    assert stats["clip_ratio/low_mean"] == 0 == stats["clip_ratio/high_mean"]


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_splitting_into_micro_batches_changes_neither_loss_nor_gradient_nor_statistics(average):
    logp, old, ref, advantages, mask = batch()
    weights = token_weights(mask, average=average, max_new_tokens=9)
    whole, whole_stats = grpo_loss(logp, old, ref, advantages, mask, weights=weights, **SETTINGS)
    (expected,) = torch.autograd.grad(whole, logp)
    parts, stats = 0.0, dict.fromkeys(whole_stats, 0.0)
    for n in range(3):
        cut = slice(n, n + 1)
        part, part_stats = grpo_loss(
            logp[cut],
            old[cut],
            ref[cut],
            advantages[cut],
            mask[cut],
            weights=weights[cut],
            **SETTINGS,
        )
        part.backward()
        parts += part.item()
        stats = {name: stats[name] + value for name, value in part_stats.items()}
    assert parts == pytest.approx(whole.item())
    torch.testing.assert_close(logp.grad, expected)
    torch.testing.assert_close(stats, whole_stats)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_the_contents_of_the_padding_change_neither_loss_nor_gradient(junk):
    logp, old, ref, advantages, mask = batch()
    expected, _ = grpo_loss(logp, old, ref, advantages, mask, **SETTINGS)
    dirty = [x.detach().masked_fill(~mask, junk) for x in (logp, old, ref)]
    loss, _ = grpo_loss(dirty[0].requires_grad_(), *dirty[1:], advantages, mask, **SETTINGS)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert (dirty[0].grad[~mask] == 0).all() and dirty[0].grad.isfinite().all()


def test_the_defaults_are_those_of_a_config():
    logp, old, ref, advantages, mask = batch()
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    settings = {name: defaults[name] for name in ("clip_low", "clip_high", "beta")}
    loss, stats = grpo_loss(logp, old, ref, advantages, mask)
    assert (loss, stats) == grpo_loss(logp, old, ref, advantages, mask, **settings)
    assert stats["clip_ratio/low_mean"] > 0 and stats["clip_ratio/high_mean"] > 0


def test_a_positive_beta_without_a_reference_is_an_error_not_a_silent_zero():
    logp, old, _, advantages, mask = batch()
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(logp, old, None, advantages, mask, **SETTINGS)
