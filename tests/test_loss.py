"""The clipped loss with KL: hand-computed values, gradients by finite differences, invariance to
splitting.
"""

import inspect
import itertools
import math

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from common.config import Config
from grpo.loss import (
    KL_ESTIMATES,
    LARGEST_LOG_RATIO,
    grpo_loss,
    kl_estimate,
    probability_ratio,
    token_weights,
    truncated_importance,
)

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
    objective = Config(model="m", train_questions="q", run_dir="r").objective
    parameters = inspect.signature(grpo_loss).parameters
    assert objective == {name: parameters[name].default for name in objective}
    logp, old, ref, advantages, mask = batch()
    _, stats = grpo_loss(logp, old, ref, advantages, mask)
    assert stats["clip_ratio/low_mean"] > 0 and stats["clip_ratio/high_mean"] > 0


def test_a_positive_beta_without_a_reference_is_an_error_not_a_silent_zero():
    logp, old, _, advantages, mask = batch()
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(logp, old, None, advantages, mask, **SETTINGS)


def test_weights_have_the_given_precision_which_fp32_thirds_would_not():
    mask = torch.ones(1, 1, 3, dtype=torch.bool)
    assert token_weights(mask).dtype == torch.float32
    weights = token_weights(mask, dtype=torch.float64)
    assert weights.tolist() == [[[1 / 3] * 3]]


# Two completions of 3 tokens and 1. Ratios 2, 1/2, 4 (geometric mean 4^(1/3)) and 1/2.
SHORT_MASK = torch.tensor([[True, True, True], [True, False, False]])
SHORT_OLD = torch.tensor([[-2.0, -1.0, -3.0], [-1.5, 0.0, 0.0]], dtype=torch.float64)
SHORT_LOG_RATIO = math.log(2) * torch.tensor([[1.0, -1.0, 2.0], [-1.0, 0.0, 0.0]]).double()
SHORT_LOGP = SHORT_OLD + SHORT_LOG_RATIO
SHORT_ADVANTAGES = torch.tensor([1.0, -2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token", [[2.0, 0.5, 4.0], [0.5, 1.0, 1.0]]),
        ("detached", [[2.0, 0.5, 4.0], [0.5, 1.0, 1.0]]),
        ("sequence", [[4 ** (1 / 3)] * 3, [0.5] * 3]),
    ],
)
def test_ratios_by_hand(kind, expected):
    ratio = probability_ratio(SHORT_LOGP, SHORT_OLD, SHORT_MASK, kind)
    torch.testing.assert_close(ratio, torch.tensor(expected, dtype=torch.float64))


def loss_by_hand(surrogate_OT: list[list[float]], **knobs) -> None:
    """Compare with the mean over the two completions of the means over their tokens."""
    means = [sum(row) / len(row) for row in surrogate_OT]
    weights = token_weights(SHORT_MASK, dtype=torch.float64)
    settings = {"clip_low": 0.2, "clip_high": 0.3, "beta": 0.0, "weights": weights, **knobs}
    loss, _ = grpo_loss(SHORT_LOGP, SHORT_OLD, None, SHORT_ADVANTAGES, SHORT_MASK, **settings)
    assert loss.item() == pytest.approx(-sum(means) / 2)


def test_the_loss_of_each_ratio_by_hand():
    # A = 1: min(r, clip(r)) = 1.3, 0.5, 1.3. A = -2: min(0.5 A, 0.8 A) = -1.6.
    loss_by_hand([[1.3, 0.5, 1.3], [-1.6]])
    # The completion's ratio is 4^(1/3) = 1.59, clipped at 1.3.
    loss_by_hand([[1.3, 1.3, 1.3], [-1.6]], ratio="sequence")
    loss_by_hand([[4 ** (1 / 3)] * 3, [-1.6]], ratio="sequence", clip_high=0.6)
    # clip(r) A log pi: no minimum, so that both bounds hold for both signs of A.
    logp = SHORT_LOGP.tolist()
    good = [1.3 * logp[0][0], 0.8 * logp[0][1], 1.3 * logp[0][2]]
    loss_by_hand([good, [0.8 * -2 * logp[1][0]]], ratio="detached")


def test_importance_multiplies_the_surrogate_but_not_the_kl_term():
    weights = torch.tensor([[2.0, 1.0, 0.5], [0.25, 1.0, 1.0]], dtype=torch.float64)
    loss_by_hand([[2.6, 0.5, 0.65], [-0.4]], importance=weights)
    args = SHORT_LOGP, SHORT_OLD, SHORT_OLD, 0 * SHORT_ADVANTAGES, SHORT_MASK
    assert grpo_loss(*args, importance=weights)[0] == grpo_loss(*args)[0] > 0


def test_truncated_importance_by_hand_and_off_at_cap_0():
    # pi_old / pi_sampler is 1/2, 2, 1/4 and 2; 1 on padding, whatever that holds.
    sampled = SHORT_LOGP.masked_fill(~SHORT_MASK, math.nan)
    old = SHORT_OLD.clone().requires_grad_()
    weights = truncated_importance(old, sampled, SHORT_MASK, 1.5)
    expected = torch.tensor([[0.5, 1.5, 0.25], [1.5, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad
    assert truncated_importance(old, sampled, SHORT_MASK, 0.0) is None


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (5.0, -2.0, 6.0, 1),  # min(r A, clip(r) A) = -10, but at least c A = -6
        (3.5, -2.0, 6.0, 1),
        (2.9, -2.0, 5.8, 0),  # below c: idle
        (0.5, -2.0, 1.6, 0),  # the lower clip is what it was
        (5.0, 2.0, -2.6, 1),  # a good token: the upper clip is what it was
        (0.5, 2.0, -1.0, 0),
    ],
)
def test_dual_clip_bounds_the_surrogate_of_a_bad_token_at_c_times_a(
    ratio, advantage, expected, clipped
):
    logp = one(math.log(ratio) - 1.0).requires_grad_()
    args = logp, one(-1.0), None, one(advantage)[..., 0], FULL
    settings = {"clip_low": 0.2, "clip_high": 0.3, "beta": 0.0}
    loss, stats = grpo_loss(*args, dual_clip=3.0, **settings)
    assert loss.item() == pytest.approx(expected)
    assert stats["clip_ratio/high_mean"].item() == clipped
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (gradient == 0) == (clipped or stats["clip_ratio/low_mean"] == 1)
    if advantage > 0 or ratio < 3:
        assert (loss, stats) == grpo_loss(*args, **settings)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [-math.log(2), math.log(4)]),
        ("k2", [math.log(2) ** 2 / 2, math.log(4) ** 2 / 2]),
        ("k3", [2 - math.log(2) - 1, 1 / 4 + math.log(4) - 1]),
    ],
)
def test_each_estimate_of_the_divergence_by_hand(kind, expected):
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    ref = logp + torch.tensor([2.0, 0.25], dtype=torch.float64).log()  # pi_ref / pi_theta
    values = kl_estimate(logp, ref, kind)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", KL_ESTIMATES)
def test_a_token_that_the_policy_made_e_to_the_100_times_rarer_keeps_loss_and_gradient_finite(kind):
    logp = torch.tensor([[[-100.0, -1.0]]], requires_grad=True)
    ref = torch.tensor([[[0.0, -1.5]]])
    args = logp, logp.detach(), ref, torch.ones(1, 1), torch.ones(1, 1, 2, dtype=torch.bool)
    loss, stats = grpo_loss(*args, kl=kind)
    loss.backward()
    assert loss.isfinite() and stats["kl"].isfinite() and logp.grad.isfinite().all()


@pytest.mark.parametrize("kind", KL_ESTIMATES)
def test_estimates_up_to_the_largest_log_ratio_are_not_touched(kind):
    x = torch.tensor([-50.0, -20.0, 0.0, 19.9], dtype=torch.float64)
    plain = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - x - 1}[kind]
    torch.testing.assert_close(kl_estimate(-x, torch.zeros_like(x), kind), plain)
    above = kl_estimate(torch.tensor(-100.0), torch.tensor(0.0), kind)
    at = kl_estimate(torch.tensor(-LARGEST_LOG_RATIO), torch.tensor(0.0), kind)
    assert above == at


@pytest.mark.parametrize("kind", ["token", "sequence", "detached"])
def test_a_ratio_of_e_to_the_100_is_finite_and_so_is_the_gradient(kind):
    logp = torch.tensor([[[-1.0]]], requires_grad=True)
    old, mask = torch.tensor([[[-101.0]]]), FULL
    loss, stats = grpo_loss(logp, old, None, -torch.ones(1, 1), mask, beta=0.0, ratio=kind)
    loss.backward()
    assert loss.isfinite() and stats["ratio"].isfinite() and logp.grad.isfinite().all()


@pytest.mark.parametrize("knob", ["ratio", "kl"])
def test_an_unknown_ratio_or_estimate_is_an_error_that_lists_the_known_ones(knob):
    logp, old, ref, advantages, mask = batch()
    with pytest.raises(ValueError, match=f"{knob} must be one of .*, not 'k4'"):
        grpo_loss(logp, old, ref, advantages, mask, **{knob: "k4"})


DUAL_CLIP = 1.4


def some_importance(mask: torch.Tensor) -> torch.Tensor:
    return torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)).double() * 2


def test_the_batch_has_tokens_on_every_branch_of_the_loss_and_none_on_an_edge():
    """Otherwise the finite differences below could pass without visiting one."""
    logp, old, _, advantages, mask = batch()
    for kind in ("token", "sequence"):
        r = probability_ratio(logp.detach(), old, mask, kind)[mask]
        bad = (advantages < 0)[..., None].expand_as(mask)[mask]
        for side in (r < 0.8, r > 1.28):
            assert (side & bad).any() and (side & ~bad).any()
        assert ((r > DUAL_CLIP) & bad).any() and ((r > 0.8) & (r < 1.28)).any()
        for edge in (0.8, 1.28, DUAL_CLIP):
            assert (r - edge).abs().min() > 1e-4


@pytest.mark.parametrize("kl", KL_ESTIMATES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("dual_clip", [None, DUAL_CLIP])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_gradient_of_all_knobs_agrees_with_finite_differences(ratio, kl, dual_clip, weighed):
    logp, old, ref, advantages, mask = batch()
    knobs = {**SETTINGS, "ratio": ratio, "kl": kl, "dual_clip": dual_clip}
    knobs["importance"] = some_importance(mask) if weighed else None
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, ref, advantages, mask, **knobs)[0], (logp,)
    )


@pytest.mark.parametrize("kl", KL_ESTIMATES)
@pytest.mark.parametrize("weighed", [False, True])
def test_the_gradient_of_the_detached_ratio_is_that_of_the_clipped_ratio_times_log_pi(kl, weighed):
    logp, old, ref, advantages, mask = batch()
    importance = some_importance(mask) if weighed else torch.ones(mask.shape).double()
    knobs = {**SETTINGS, "ratio": "detached", "kl": kl, "importance": importance}

    def loss(x):
        return grpo_loss(x, old, ref, advantages, mask, **knobs)[0]

    (gradient,) = torch.autograd.grad(loss(logp), logp)
    # The loss itself also moves with its ratio, so its differences are not its gradient.
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(loss, (logp,))

    fixed = (logp.detach() - old).exp().clamp(0.8, 1.28)  # the ratio, where we stand
    weights, step = token_weights(mask), 1e-6

    def at(place, x):
        delta = ref[place] - x
        divergence = {"k1": -delta, "k2": delta**2 / 2, "k3": delta.exp() - delta - 1}[kl]
        surrogate = fixed[place] * advantages[place[:2]] * x * importance[place]
        return weights[place] * (0.04 * divergence - surrogate)

    for place in itertools.product(range(3), range(2), range(5)):
        x = logp[place].detach()
        expected = (at(place, x + step) - at(place, x - step)) / (2 * step) if mask[place] else 0.0
        assert gradient[place].item() == pytest.approx(float(expected), abs=1e-8)
