"""The lesson on a table of logits: exact figures, samples of known expectation, and the page."""

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miniature.lesson import __main__ as program
from miniature.lesson import presets
from miniature.lesson.gradient import Groups, compare, keep_informative, step_gradients
from miniature.lesson.measurements import EXACT, UNBIASED, sample_steps
from miniature.lesson.policy import (
    COMPLETIONS,
    LIMIT,
    PREFIXES,
    QUESTIONS,
    REWARDS_QO,
    START,
    TOKENS,
    completion_logprobs,
    divergence,
    divergence_of_tokens,
    exact_gradient,
    expected_reward,
    probabilities,
    random_table,
)
from miniature.lesson.presets import TRAINING, configs, train

PAGE = Path(__file__).resolve().parent.parent / "docs" / "grpo.md"


def test_logprobs_equal_a_slow_walk_over_every_completion():
    logp_QOT = completion_logprobs(START)
    for q in range(len(QUESTIONS)):
        for o, completion in enumerate(COMPLETIONS):
            expected = [0.0] * LIMIT
            for t, token in enumerate(completion):
                row = START[q, PREFIXES.index(completion[:t])]
                odds = [math.exp(x) for x in row.tolist()]
                expected[t] = math.log(odds[TOKENS.index(token)] / sum(odds))
            assert logp_QOT[q, o].tolist() == pytest.approx(expected)
    torch.testing.assert_close(probabilities(START).sum(-1), torch.ones(4, dtype=torch.float64))


def test_a_reward_needs_the_letter_and_then_the_end():
    right = [text for text, r in zip(COMPLETIONS, REWARDS_QO[0], strict=True) if r]
    assert right == ["a.", "aa.", "ba.", "ca."]


def test_exact_gradient_agrees_with_finite_differences():
    generator, step = torch.Generator().manual_seed(0), 1e-5
    for _ in range(5):
        direction = torch.randn(START.shape, generator=generator, dtype=START.dtype)
        change = expected_reward(START + step * direction) - expected_reward(
            START - step * direction
        )
        slope = change.item() / (2 * step * LIMIT)
        assert (EXACT * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_divergence_of_tokens_has_the_value_of_the_divergence_and_another_gradient():
    moved = (START + random_table(seed=1)).requires_grad_()
    whole, tokens = divergence(moved), divergence_of_tokens(moved)
    assert tokens.item() == pytest.approx(whole.item())
    gradients = [torch.autograd.grad(one, moved)[0] for one in (whole, tokens)]
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("size", [2, 8])
def test_leave_one_out_is_unbiased_and_mean_is_short_by_one_in_g(size):
    groups = sample_steps(size, 8000)
    gradients, _ = step_gradients(UNBIASED, groups)
    measured = compare(gradients, EXACT)
    assert abs(measured.length.value - 1) < 3 * measured.length.error < 0.05
    assert abs(measured.cosine.value - 1) < 3 * measured.cosine.error + 1e-3
    of_mean, _ = step_gradients(replace(UNBIASED, advantage_baseline="mean"), groups)
    torch.testing.assert_close(of_mean, gradients * (size - 1) / size)


def test_standard_errors_are_those_of_repeated_measurements():
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([3.0, 4.0])
    turned = torch.tensor([4.0, 4.0])
    repeats = []
    for _ in range(300):
        repeats.append(compare(turned + torch.randn(50, 2, generator=generator), exact))
    cosines = torch.tensor([one.cosine.value for one in repeats])
    lengths = torch.tensor([one.length.value for one in repeats])
    assert cosines.mean().item() == pytest.approx(28 / 5 / 32**0.5, abs=1e-3)
    assert lengths.mean().item() == pytest.approx(32**0.5 / 5, abs=5e-3)
    cosine_errors = torch.tensor([one.cosine.error for one in repeats])
    length_errors = torch.tensor([one.length.error for one in repeats])
    assert cosines.std().item() == pytest.approx(cosine_errors.mean().item(), rel=0.1)
    assert lengths.std().item() == pytest.approx(length_errors.mean().item(), rel=0.1)


def test_a_mean_gradient_of_nothing_but_noise_has_no_direction():
    noise = torch.randn(1000, 208, generator=torch.Generator().manual_seed(0))
    measured = compare(noise, torch.ones(208))
    assert math.isnan(measured.cosine.value) and measured.length.value == 0 < measured.length.error


def test_before_an_update_no_ratio_or_clip_changes_the_gradient():
    groups = sample_steps(8, 100)
    expected, _ = step_gradients(UNBIASED, groups)
    for ratio in ("token", "sequence", "detached"):
        config = replace(UNBIASED, ratio=ratio, clip_low=3e-4, clip_high=4e-4)
        gradients, stats = step_gradients(config, groups)
        torch.testing.assert_close(gradients, expected)
        assert not stats["clip_ratio/low_mean"].any() and not stats["clip_ratio/high_mean"].any()


def test_groups_are_kept_by_their_rewards_without_the_length_penalty():
    """A right completion of three tokens loses its reward, and a wrong one does not have one."""
    long_right, short_right, wrong = (COMPLETIONS.index(text) for text in ("aa.", "a.", "b."))
    completions_NG = torch.tensor([[long_right, short_right], [short_right, wrong]])
    groups = Groups(torch.zeros(1, 2).long(), completions_NG[None], torch.ones(1, 2, 2))
    groups.rewards_NG[0, 1, 1] = 0.0
    config = replace(UNBIASED, prompts_per_step=1, oversampling=2.0, length_penalty=0.5)
    kept = keep_informative(groups, config)
    assert kept.completions_NG.tolist() == [[[short_right, wrong]]]


def test_every_preset_raises_the_expected_reward():
    for name, config in configs().items():
        rewards_SR = train(replace(config, steps=20), runs=4)
        assert rewards_SR.shape == (21, 4)
        assert (rewards_SR[-1] > rewards_SR[0] + 0.05).all(), name


def test_training_twice_gives_the_same_numbers():
    config = replace(TRAINING, steps=5)
    assert torch.equal(train(config, runs=3), train(config, runs=3))


def test_the_page_and_the_picture_are_written_and_the_tables_printed(tmp_path, monkeypatch, capsys):
    for name in ("grpo.md", "tour.md"):
        shutil.copy(PAGE.parent / name, tmp_path)
    small = ["lesson", "--docs", str(tmp_path), "--replicates", "100", "--runs", "2"]
    monkeypatch.setattr(sys, "argv", small)
    monkeypatch.setattr(presets, "TRAINING", replace(TRAINING, steps=4))
    monkeypatch.setattr(presets, "STEPS_SHOWN", (2, 4))
    program.run_lesson()
    written, printed = (tmp_path / "grpo.md").read_text(), capsys.readouterr().out
    for name in program.LESSONS:
        begin, end = f"<!-- {name}: written by a command -->\n", f"<!-- {name}: end -->\n"
        table = written.partition(begin)[2].partition(end)[0]
        assert table.count("\n") > 4 and name.upper() in printed
    assert (tmp_path / "lesson.svg").read_text().count("polyline class=") > 10


def test_the_exact_gradient_points_uphill():
    assert expected_reward(START + exact_gradient(START)) > expected_reward(START)
