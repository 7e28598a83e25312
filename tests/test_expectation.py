"""The mean gradient of the loss, over all groups that a small policy can sample, against the exact
gradient of what it stands for: the expected reward, or a divergence from the reference.

The policy is a table of float64 logits over two tokens, one row per prefix. There are so few
completions that every group of them can be enumerated, with its probability.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from grpo.advantages import group_advantages
from grpo.loss import RATIOS, grpo_loss, kl_estimate, token_weights, truncated_importance

EXACT = {"rtol": 0, "atol": 1e-10}
ROWS: dict[tuple[int, ...], int] = {(): 0, (0,): 1, (1,): 2}  # prefix -> its row of the table

LANGUAGES = {
    "one token": [(0,), (1,)],
    "two tokens": [(0, 0), (0, 1), (1, 0), (1, 1)],
    "one or two tokens": [(1,), (0, 0), (0, 1)],  # 1 ends the turn
}
REWARDS = torch.tensor([4.0, -1.0, 1.5, 0.2], dtype=torch.float64)
Completions = list[tuple[int, ...]]


@pytest.fixture(params=LANGUAGES)
def completions(request) -> Completions:
    return LANGUAGES[request.param]


def policy() -> Tensor:
    rows = [[0.3, -0.4], [-0.9, 0.2], [0.5, 0.6]]
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def reference() -> Tensor:
    return torch.tensor([[-1.5, 0.6], [1.7, 0.4], [0.2, -1.8]], dtype=torch.float64)


def token_logprobs(logits: Tensor, completions: Completions) -> tuple[Tensor, Tensor]:
    """log pi of every token of every completion, (O, T), and the mask; padding holds NaN."""
    longest = max(map(len, completions))
    logp = torch.full((len(completions), longest), math.nan, dtype=torch.float64)
    table = logits.log_softmax(-1)
    for o, completion in enumerate(completions):
        for t, token in enumerate(completion):
            logp[o, t] = table[ROWS[completion[:t]], token]
    return logp, ~logp.isnan()


def probabilities(logits: Tensor, completions: Completions) -> Tensor:
    logp, mask = token_logprobs(logits, completions)
    return logp.masked_fill(~mask, 0.0).sum(-1).exp()


def gradient_of(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def policy_gradient(completions: Completions) -> Tensor:
    """The exact gradient of the expected reward."""
    logits = policy()
    chances = probabilities(logits, completions)
    assert chances.sum().item() == pytest.approx(1)
    return gradient_of((chances * REWARDS[: len(chances)]).sum(), logits)


def groups_of(completions: Completions, size: int, chances: Tensor) -> tuple[Tensor, Tensor]:
    """All groups of `size` completions, (N, G), and the probability of each."""
    groups = torch.tensor(list(itertools.product(range(len(completions)), repeat=size)))
    chances_N = chances[groups].prod(-1)
    assert chances_N.sum().item() == pytest.approx(1)
    return groups, chances_N


def mean_gradient(
    completions: Completions,
    size: int,
    *,
    baseline: str = "mean",
    scale: str = "none",
    average: str = "constant",
    ratio: str = "token",
) -> Tensor:
    """Minus the gradient of `grpo_loss`, in the mean over all groups of `size` completions.

    Each group is a step of its own. All go through the loss at once, weighted by their
    probabilities.
    """
    logits = policy()
    logp, mask = token_logprobs(logits, completions)
    chances = probabilities(logits, completions).detach()
    groups, chances_N = groups_of(completions, size, chances)
    weights = []
    for chance, group in zip(chances_N, groups, strict=True):
        # With a limit of 1, the constant divisor is the number of completions.
        limits = {"average": average, "max_new_tokens": 1, "dtype": torch.float64}
        weights.append(chance * token_weights(mask[group], **limits))
    advantages = group_advantages(REWARDS[groups], baseline=baseline, scale=scale)
    loss, stats = grpo_loss(
        logp[groups],
        logp[groups].detach(),
        None,
        advantages,
        mask[groups],
        beta=0.0,
        ratio=ratio,
        weights=torch.stack(weights),
    )
    assert stats["clip_ratio/low_mean"] == stats["clip_ratio/high_mean"] == 0
    return -gradient_of(loss, logits)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [2, 3])
def test_the_groups_mean_as_baseline_shrinks_the_policy_gradient_by_one_part_in_G(
    completions, size, ratio
):
    expected = (size - 1) / size * policy_gradient(completions)
    torch.testing.assert_close(mean_gradient(completions, size, ratio=ratio), expected, **EXACT)


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_and_no_baseline_give_the_policy_gradient(completions, baseline, size, ratio):
    gradient = mean_gradient(completions, size, baseline=baseline, ratio=ratio)
    torch.testing.assert_close(gradient, policy_gradient(completions), **EXACT)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_dividing_by_the_groups_standard_deviation_changes_the_mean_gradient(
    completions, size, baseline
):
    gradient = mean_gradient(completions, size, baseline=baseline, scale="std")
    shrunk = 1.0 if baseline == "mean" else size / (size - 1)
    slow = torch.tensor(mean_of_standardised_scores(completions, size), dtype=torch.float64)
    torch.testing.assert_close(gradient, shrunk * slow, **EXACT)

    unscaled = (size - 1) / size if baseline == "mean" else 1.0
    expected = unscaled * policy_gradient(completions)
    assert (gradient - expected).norm() > 0.2 * expected.norm()
    if len(completions) > 2:  # with a single logit to move, there are but two directions
        assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) < 0.999


def mean_of_standardised_scores(completions: Completions, size: int) -> list[list[float]]:
    """sum over groups of P(group) 1/G sum_i (r_i - mean) / std * grad log pi(o_i), in plain Python.

    The gradient of log pi(token | prefix) in the prefix's logits is (1 if it is the token, else 0)
    - pi.
    """
    pi = []
    for row in policy().tolist():
        total = sum(map(math.exp, row))
        pi.append([math.exp(logit) / total for logit in row])
    gradient = [[0.0, 0.0] for _ in pi]
    for group in itertools.product(range(len(completions)), repeat=size):
        chance = 1.0
        for o in group:
            for t, token in enumerate(completions[o]):
                chance *= pi[ROWS[completions[o][:t]]][token]
        rewards = [REWARDS[o].item() for o in group]
        mean = sum(rewards) / size
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (size - 1))
        if deviation < 1e-12:
            continue  # equal rewards: nothing to learn
        for o, reward in zip(group, rewards, strict=True):
            advantage = (reward - mean) / deviation
            for t, token in enumerate(completions[o]):
                row = ROWS[completions[o][:t]]
                for other in (0, 1):
                    score = (other == token) - pi[row][other]
                    gradient[row][other] += chance * advantage / size * score
    return gradient


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_averaging_over_lengths_turns_the_gradient_away_where_lengths_differ(average):
    """The bias that Dr. GRPO names, and its constant divisor avoids."""
    mixed = LANGUAGES["one or two tokens"]
    gradient = mean_gradient(mixed, 2, baseline="none", average=average)
    exact = policy_gradient(mixed)
    assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) < 0.999
    # At equal lengths, every average gives the same but for a constant.
    equal = LANGUAGES["two tokens"]
    gradient = mean_gradient(equal, 2, baseline="none", average=average)
    torch.testing.assert_close(2 * gradient, policy_gradient(equal), **EXACT)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_ratio_corrects_for_completions_of_an_older_policy(ratio):
    """pi_old sampled, pi_theta is trained: unclipped and at one token, the ratio is exact."""
    tokens = LANGUAGES["one token"]
    logits = policy()
    logp, mask = token_logprobs(logits, tokens)
    old, _ = token_logprobs(reference(), tokens)
    unclipped = {"clip_low": 1.0, "clip_high": 1e6, "beta": 0.0, "ratio": ratio}
    chances = old.exp()  # of completions of one token, which weigh the loss
    loss, _ = grpo_loss(logp, old, None, REWARDS[:2], mask, weights=chances, **unclipped)
    torch.testing.assert_close(-gradient_of(loss, logits), policy_gradient(tokens), **EXACT)


def test_truncated_importance_corrects_for_a_sampler_with_other_probabilities():
    tokens = LANGUAGES["one token"]
    sampled, mask = token_logprobs(reference(), tokens)

    def gradient(cap: float) -> Tensor:
        logits = policy()
        logp, _ = token_logprobs(logits, tokens)
        old = logp.detach()
        importance = truncated_importance(old, sampled, mask, cap)
        knobs = {"importance": importance, "weights": sampled.exp(), "beta": 0.0}
        loss, _ = grpo_loss(logp, old, None, REWARDS[:2], mask, **knobs)
        return -gradient_of(loss, logits)

    exact = policy_gradient(tokens)
    torch.testing.assert_close(gradient(1e6), exact, **EXACT)
    assert (gradient(0) - exact).norm() > 0.1 * exact.norm()
    assert (gradient(1.0) - exact).norm() > 0.01 * exact.norm()  # the price of the cap: a bias


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of each row's distribution."""
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    return (one.exp() * (one - other)).sum(-1)


def mean_over_prefixes(values: Tensor, completions: Completions) -> Tensor:
    """Sum over prefixes of the probability of reaching one, times its row's value.

    The probabilities have no gradient: an estimate is of a token's own distribution, and the effect
    of a token on the divergence of later ones is left out.
    """
    chances = probabilities(policy().detach(), completions)
    total = torch.zeros((), dtype=torch.float64)
    for o, completion in enumerate(completions):
        for t in range(len(completion)):
            total = total + chances[o] * values[ROWS[completion[:t]]]
    return total


def mean_estimate(kind: str, completions: Completions) -> tuple[Tensor, Tensor]:
    """The mean of a completion's summed estimates, and the mean of their gradient.

    By way of `grpo_loss`, with advantages of 0.
    """
    logits = policy()
    logp, mask = token_logprobs(logits, completions)
    ref, _ = token_logprobs(reference(), completions)
    chances = probabilities(logits, completions).detach()
    weights = mask * chances[:, None]
    zeros = torch.zeros(len(completions), dtype=torch.float64)
    loss, stats = grpo_loss(
        logp, logp.detach(), ref, zeros, mask, beta=0.5, kl=kind, weights=weights
    )
    assert loss.item() == pytest.approx(0.5 * stats["kl"].item())
    clean = [x.masked_fill(~mask, 0.0) for x in (logp.detach(), ref)]
    torch.testing.assert_close(stats["kl"], (weights * kl_estimate(*clean, kind)).sum())
    return stats["kl"], gradient_of(loss, logits) / 0.5


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_estimates_of_the_divergence_from_the_reference(completions, kind):
    exact = mean_over_prefixes(divergence(policy(), reference()), completions)
    torch.testing.assert_close(mean_estimate(kind, completions)[0], exact, **EXACT)
    # The chain rule: the divergences of the tokens add up to that of whole completions.
    p, q = (probabilities(logits, completions) for logits in (policy(), reference()))
    torch.testing.assert_close((p * (p / q).log()).sum(), exact, **EXACT)


def test_k2_is_biased_and_close_to_the_divergence_while_that_is_small(completions):
    logits = policy().detach()
    exact = mean_over_prefixes(divergence(logits, reference()), completions)
    assert (mean_estimate("k2", completions)[0] - exact).abs() > 0.005
    for distance in (0.1, 0.01):
        near = logits + distance * reference()
        p, x = logits.softmax(-1), near.log_softmax(-1) - logits.log_softmax(-1)
        mean = (p * kl_estimate(-x, torch.zeros_like(x), "k2")).sum(-1)
        exact = divergence(logits, near)
        assert ((mean - exact).abs() < distance * exact).all() and (exact > 0).all()


def test_the_mean_gradient_of_k1_is_zero(completions):
    _, gradient = mean_estimate("k1", completions)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


def test_the_mean_gradient_of_k2_is_that_of_the_divergence_from_the_reference(completions):
    logits = policy()
    exact = mean_over_prefixes(divergence(logits, reference()), completions)
    _, gradient = mean_estimate("k2", completions)
    torch.testing.assert_close(gradient, gradient_of(exact, logits), **EXACT)


def test_the_mean_gradient_of_k3_is_that_of_the_divergence_of_the_reference(completions):
    logits = policy()
    exact = mean_over_prefixes(divergence(reference(), logits), completions)
    _, gradient = mean_estimate("k3", completions)
    torch.testing.assert_close(gradient, gradient_of(exact, logits), **EXACT)


def test_no_estimate_sees_how_a_token_changes_the_divergence_of_later_ones():
    """So at two tokens, the gradient of k2 is not that of the whole completions' divergence."""
    tokens, logits = LANGUAGES["two tokens"], policy()
    p, q = probabilities(logits, tokens), probabilities(reference(), tokens)
    whole = gradient_of((p * (p / q).log()).sum(), logits)
    assert (mean_estimate("k2", tokens)[1] - whole).norm() > 0.05 * whole.norm()
