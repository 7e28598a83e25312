"""The knobs of the method together: which of them coincide and where, what none of them may depend
on, and that a training run heeds each one.
"""

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import rows, run, weights
from tiny_run import write_run
from torch import Tensor

import train
from common.config import Loss, Rewards, Rollout, load_config
from data import load_vocabulary
from data.choice import load_questions, prompt_encoder
from data.stream import questions_of_step
from grpo.advantages import group_advantages
from grpo.loss import (
    AVERAGES,
    KL_ESTIMATES,
    RATIOS,
    grpo_loss,
    token_weights,
    truncated_importance,
)
from grpo.rollout import Rollout as Groups
from grpo.rollout import informative_groups
from model import read_config
from rewards import Verdict
from training.scoring import length_penalty, score_rollout
from training.step import Step

CLIP = {"clip_low": 0.1, "clip_high": 0.1}
DUAL_CLIP = 1.2
N, G, T = 3, 2, 5


class Inputs:
    """A step of three groups of two completions, whose ratios lie far from 1."""

    def __init__(self, lengths: list[list[int]] | None = None) -> None:
        generator = torch.Generator().manual_seed(14)

        def draw() -> Tensor:
            return -torch.rand(N, G, T, generator=generator, dtype=torch.float64) - 0.1

        lengths_NG = torch.tensor(lengths or [[5, 1], [3, 4], [2, 2]])
        self.mask = torch.arange(T) < lengths_NG[..., None]
        self.logp, self.old, self.ref, self.sampled = draw(), draw(), draw(), draw()
        self.advantages = torch.tensor([[1.0, -2.0], [-0.5, 1.5], [2.0, -1.0]]).double()

    def weights(self, average: str) -> Tensor:
        return token_weights(self.mask, average=average, max_new_tokens=9, dtype=torch.float64)

    def loss(
        self, weights: Tensor, where: Any = slice(None), *, cap: float = 0.0, **knobs: Any
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, gradient and statistics of the groups at `where`, cut to their longest."""
        mask = self.mask[where]
        longest = int(mask.sum(-1).max())

        def cut(x: Tensor) -> Tensor:
            return x[where][..., :longest]

        logp = cut(self.logp).clone().requires_grad_()
        importance = truncated_importance(cut(self.old), cut(self.sampled), cut(self.mask), cap)
        loss, stats = grpo_loss(
            logp,
            cut(self.old),
            cut(self.ref),
            self.advantages[where],
            cut(self.mask),
            importance=importance,
            weights=cut(weights),
            **CLIP | knobs,
        )
        (gradient,) = torch.autograd.grad(loss, logp)
        return loss.detach(), torch.nn.functional.pad(gradient, (0, T - longest)), stats


def combinations(**knobs: Any) -> list[dict[str, Any]]:
    """All combinations in which every knob has an effect."""
    knobs |= {
        "ratio": RATIOS,
        "kl": KL_ESTIMATES,
        "dual_clip": (None, DUAL_CLIP),
        "cap": (0.0, 1.5),
    }
    every = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]
    return [one for one in every if not (one["dual_clip"] and one["ratio"] == "detached")]


@pytest.mark.parametrize("average", AVERAGES)
def test_no_knob_makes_the_loss_depend_on_micro_batches(average):
    step = Inputs()
    for knobs in combinations():
        whole = step.loss(step.weights(average), **knobs)
        parts = [step.loss(step.weights(average), slice(n, n + 1), **knobs) for n in range(N)]
        loss = sum(part[0] for part in parts)
        gradient = torch.cat([part[1] for part in parts])
        stats = {name: sum(part[2][name] for part in parts) for name in whole[2]}
        torch.testing.assert_close((loss, gradient, stats), whole, msg=str(knobs))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf")])
def test_no_knob_lets_the_padding_into_the_loss(average, junk):
    clean, dirty = Inputs(), Inputs()
    for name in ("logp", "old", "ref", "sampled"):
        setattr(dirty, name, getattr(dirty, name).masked_fill(~dirty.mask, junk))
    for knobs in combinations():
        expected = clean.loss(clean.weights(average), **knobs)
        actual = dirty.loss(dirty.weights(average), **knobs)
        torch.testing.assert_close(actual, expected, msg=str(knobs))
        assert (actual[1][~dirty.mask] == 0).all(), knobs


@pytest.mark.parametrize("average", AVERAGES)
def test_no_knob_makes_the_loss_depend_on_the_order_of_groups_and_completions(average):
    step, shuffled = Inputs(), Inputs()
    groups, completions = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    for name, value in vars(step).items():
        setattr(shuffled, name, value[groups][:, completions])
    for knobs in combinations():
        loss, gradient, stats = step.loss(step.weights(average), **knobs)
        expected = loss, gradient[groups][:, completions], stats
        actual = shuffled.loss(shuffled.weights(average), **knobs)
        torch.testing.assert_close(actual, expected, msg=str(knobs))


def test_the_combinations_above_differ_so_that_each_knob_was_really_turned():
    step = Inputs()
    losses = [step.loss(step.weights("token"), **knobs)[0].item() for knobs in combinations()]
    assert len({round(loss, 4) for loss in losses}) == len(losses) == 30


@pytest.mark.parametrize("average", AVERAGES)
def test_gspo_is_grpo_where_completions_have_a_single_token(average):
    step = Inputs([[1, 1], [1, 1], [1, 1]])
    token = step.loss(step.weights(average), ratio="token")
    torch.testing.assert_close(step.loss(step.weights(average), ratio="sequence"), token)
    assert token[2]["clip_ratio/low_mean"] > 0 and token[2]["clip_ratio/high_mean"] > 0
    # And only there.
    step = Inputs()
    token, sequence = (step.loss(step.weights(average), ratio=r)[0] for r in ("token", "sequence"))
    assert (token - sequence).abs() > 0.01


def test_dapo_with_a_symmetric_clip_is_grpo_where_lengths_are_equal():
    step = Inputs([[4, 4], [4, 4], [4, 4]])
    torch.testing.assert_close(step.weights("token"), step.weights("sequence"))
    symmetric = {"clip_low": 0.2, "clip_high": 0.2}
    token, sequence = (step.loss(step.weights(a), **symmetric) for a in ("token", "sequence"))
    torch.testing.assert_close(token, sequence)
    step = Inputs()
    assert not torch.allclose(step.weights("token"), step.weights("sequence"))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("clip", [0.2, 3e-4, 0.0])
def test_at_ratio_1_every_clip_is_idle_and_all_ratios_have_one_gradient(average, clip):
    step = Inputs()
    step.old = step.logp
    plain = -step.weights(average) * step.advantages[..., None]
    for ratio, dual_clip in (*itertools.product(RATIOS[:2], (None, 1.1)), ("detached", None)):
        knobs = {"ratio": ratio, "dual_clip": dual_clip, "beta": 0.0}
        _, gradient, stats = step.loss(
            step.weights(average), clip_low=clip, clip_high=clip, **knobs
        )
        torch.testing.assert_close(gradient, plain)
        assert stats["clip_ratio/low_mean"] == stats["clip_ratio/high_mean"] == 0
        torch.testing.assert_close(stats["ratio"], step.weights(average).sum())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_dual_clip_is_idle_where_advantages_are_positive_and_below_its_bound(ratio):
    step = Inputs()
    weights = step.weights("sequence")
    bounded = step.loss(weights, ratio=ratio, dual_clip=DUAL_CLIP)
    assert (bounded[0] - step.loss(weights, ratio=ratio)[0]).abs() > 0.01
    high = step.loss(weights, ratio=ratio, dual_clip=100.0)
    torch.testing.assert_close(high, step.loss(weights, ratio=ratio))
    step.advantages = step.advantages.abs()
    bounded = step.loss(weights, ratio=ratio, dual_clip=DUAL_CLIP)
    torch.testing.assert_close(bounded, step.loss(weights, ratio=ratio))


EQUAL, MIXED = [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("groups", "count", "kept"),
    [
        ([EQUAL, MIXED, MIXED, EQUAL, MIXED], 2, [1, 2]),  # the first, not the last
        ([EQUAL, MIXED, MIXED, EQUAL, MIXED], 3, [1, 2, 4]),
        ([EQUAL, MIXED, EQUAL, EQUAL, MIXED], 3, [0, 1, 4]),  # filled up with the first equal one
        ([EQUAL, MIXED, EQUAL], 3, [0, 1, 2]),  # no spare group: as they are
        ([EQUAL, MIXED], 3, [0, 1]),  # fewer than asked for, as after unreadable images
        ([EQUAL, EQUAL, EQUAL], 2, [0, 1]),
        ([MIXED, MIXED, MIXED], 2, [0, 1]),
    ],
)
def test_dynamic_sampling_keeps_the_first_groups_whose_rewards_differ(groups, count, kept):
    assert informative_groups(torch.tensor(groups), count) == kept


def test_the_penalty_of_long_completions_is_equation_13_of_dapo():
    """R_length: 0 up to L_max - L_cache, then falling linearly, and -1 from L_max on."""
    limit, cache = 20, 5
    for length in range(1, 22):
        if length <= limit - cache:
            expected = 0.0
        elif length <= limit:
            expected = ((limit - cache) - length) / cache
        else:
            expected = -1.0
        penalty = length_penalty(torch.tensor([[length]]), limit, cache / limit)
        assert -penalty.item() == pytest.approx(expected)
    # A zone of no whole number of tokens: 102.4 of 512.
    assert length_penalty(torch.tensor([[410]]), 512, 0.2).item() == pytest.approx(0.4 / 102.4)
    # The whole length as cache: from the first token on.
    assert length_penalty(torch.tensor([[5]]), 20, 1.0).item() == pytest.approx(0.25)


def test_at_the_limit_the_penalty_is_exactly_1_whatever_the_share():
    """Else a right but truncated completion and a wrong one, both worth 0, would be told apart."""
    for limit in (3, 10, 40, 100, 512, 1000, 20480):
        for share in (0.01, 0.1, 0.2, 0.3, 0.7, 1.0):
            penalties = length_penalty(torch.tensor([[limit, 1]]), limit, share)
            assert penalties[0, 0] == 1 and 0 <= penalties[0, 1] < 1


@pytest.mark.parametrize("share", [1e-300, 1e-45, 1e-17, 1e-9, 0.01])
def test_a_penalised_share_of_less_than_a_token_penalises_truncated_completions_alone(share):
    penalties = length_penalty(torch.tensor([[1, 19, 20]]), 20, share)
    torch.testing.assert_close(penalties, torch.tensor([[0.0, 0.0, 1.0]]))


END_IDS = [*range(100, 150), 322]
"""So many ids that a random model ends some completions at once and others never."""
BASE = {
    "steps": 1,
    "inner_updates": 2,
    "learning_rate": 1e-2,
    "clip_low": 0.05,
    "clip_high": 0.1,
    "seed": 18,
    "beta": 0.1,
    "max_grad_norm": 100.0,
    "test_questions": [],
    "micro_batch_tokens": 100_000,
    "freeze_vision": True,
}


def two_rules(completion: str, answer: str) -> tuple[Verdict, ...]:
    """Rules whose scores are 0 or 1, so that some groups of a random model have equal rewards."""
    is_long, has_e = float(len(completion) > 12), float("e" in completion)
    return Verdict("format", is_long, "length"), Verdict("accuracy", has_e, "an e")


def tiny(monkeypatch, folder: Path, *, ends: bool = True, **knobs: Any) -> Path:
    """The config of a tiny run by the rules above; with `ends`, some completions are complete."""
    folder.mkdir(exist_ok=True)
    config = write_run(folder, **BASE | knobs)
    if ends:
        generation = json.dumps({"eos_token_id": END_IDS})
        (folder / "base" / "generation_config.json").write_text(generation)
    monkeypatch.setattr("training.scoring.score", two_rules)
    return config


CHANGES: dict[str, list[dict[str, Any]]] = {
    "inner_updates": [{"inner_updates": 1}],
    "clip_low": [{"clip_low": 0.5}],
    "clip_high": [{"clip_high": 0.5}],
    "ratio": [{"ratio": "sequence"}, {"ratio": "detached"}],
    "dual_clip": [{"dual_clip": 1.01}],
    "importance_cap": [{"importance_cap": 1.0}],
    "beta": [{"beta": 0.2}],
    "kl": [{"kl": "k2"}, {"kl": "k1"}],
    "advantage_baseline": [
        {"advantage_baseline": "leave_one_out"},
        {"advantage_baseline": "none", "advantage_scale": "none"},
    ],
    "advantage_scale": [{"advantage_scale": "batch_std"}, {"advantage_scale": "none"}],
    "loss_average": [{"loss_average": "token"}, {"loss_average": "constant"}],
    "mask_truncated": [{"mask_truncated": True}],
    "sft_answer": [{"sft_answer": "bare"}, {"sft_answer": "named"}],
    "prompts_per_step": [{"prompts_per_step": 2}],
    "oversampling": [{"oversampling": 2.0}],
    "group_size": [{"group_size": 3}],
    "max_new_tokens": [{"max_new_tokens": 6}],
    "temperature": [{"temperature": 0.8}],
    "format_weight": [{"format_weight": 0.5}],
    "accuracy_weight": [{"accuracy_weight": 0.5}],
    "length_penalty": [{"length_penalty": 0.5}],
}
"""Every field of the headings [loss], [rollout] and [rewards], and how to turn it."""
TURNED = [(name, change) for name, changes in CHANGES.items() for change in changes]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The config of the runs that only flags tell apart."""
    with pytest.MonkeyPatch.context() as patch:
        return tiny(patch, tmp_path_factory.mktemp("turned"))


def trained(monkeypatch, config: Path, name: str, **knobs: Any) -> dict[str, Tensor]:
    """The weights after a tiny run, in a folder `name` of its own.

    Its sampler's log-probabilities are inexact, so that weighing tokens by them has an effect.
    """
    monkeypatch.setattr("training.scoring.score", two_rules)
    flags = ["--run_dir", str(config.parent / name / "run")]
    for knob, value in knobs.items():
        flags += [f"--{knob}", str(value).lower()]
    sample, generator = train.sample_groups, torch.Generator().manual_seed(0)

    def inexact(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        noise_NGT = 0.2 * torch.randn(rollout.logp_NGT.shape, generator=generator)
        return replace(rollout, logp_NGT=rollout.logp_NGT + noise_NGT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_groups", inexact)
        assert run(patch, config, *flags) == 0
    return weights(config.parent / name)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def unturned(config) -> dict[str, dict[str, Tensor]]:
    """Method -> the weights at the end of a run with no knob turned."""
    with pytest.MonkeyPatch.context() as patch:
        ends = {name: trained(patch, config, name, method=name) for name in ("grpo", "sft")}
        # A run depends on nothing but its config, so a difference comes from the knob.
        assert equal(trained(patch, config, "again"), ends["grpo"])
        # The baseline "none" needs another scale, which alone also makes a difference.
        ends["unscaled"] = trained(patch, config, "unscaled", advantage_scale="none")
    return ends


@pytest.mark.parametrize("heading", [Rollout, Rewards, Loss])
def test_every_knob_of_a_heading_is_turned_in_the_test_below(heading):
    for one in fields(heading):
        assert one.name in CHANGES, f"{one.name}: add how to turn it"
        for choice in one.metadata.get("choices", ())[1:]:
            assert choice in [change.get(one.name) for change in CHANGES[one.name]]


@pytest.mark.parametrize(("name", "change"), TURNED, ids=str)
def test_a_knob_that_no_code_heeds_would_end_with_the_same_weights(
    monkeypatch, config, unturned, name, change
):
    method = "sft" if name == "sft_answer" else "grpo"
    expected = unturned["unscaled" if change.get("advantage_baseline") == "none" else method]
    turned = trained(monkeypatch, config, f"turned {change}", method=method, **change)
    assert not equal(turned, expected)


def observed_rollouts(monkeypatch) -> list[Any]:
    """The rollouts that the sampler returns from now on."""
    rollouts, sample = [], train.sample_groups

    def observed(*args, **kwargs):
        rollouts.append(sample(*args, **kwargs))
        return rollouts[-1]

    monkeypatch.setattr(train, "sample_groups", observed)
    return rollouts


@pytest.mark.parametrize("penalised", [0.0, 0.7])
def test_oversampling_measures_all_groups_and_trains_on_those_that_dynamic_sampling_keeps(
    tmp_path, monkeypatch, penalised
):
    knobs = {"prompts_per_step": 2, "oversampling": 2.5, "group_size": 3, "steps": 8}
    knobs |= {"inner_updates": 1, "learning_rate": 1e-5, "beta": 0.0}
    knobs |= {"length_penalty": penalised, "format_weight": 2.0}
    config = tiny(monkeypatch, tmp_path, **knobs)
    rollouts = observed_rollouts(monkeypatch)
    assert run(monkeypatch, config) == 0
    completions = iter(rows(tmp_path / "run" / "completions.jsonl"))
    replaced, by_penalty = [], []
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    for rollout, row in zip(rollouts, metrics, strict=True):
        assert len(rollout.prompts) == 5
        verdicts_NG = [[two_rules(text, "") for text in texts] for texts in rollout.texts]
        format_NG, accuracy_NG = (
            torch.tensor([[verdicts[rule].score for verdicts in group] for group in verdicts_NG])
            for rule in (0, 1)
        )
        scores_NG, lengths_NG = 2 * format_NG + accuracy_NG, rollout.mask_NGT.sum(-1)
        rewards_NG = scores_NG
        if penalised:
            rewards_NG = scores_NG - length_penalty(lengths_NG, 10, penalised)
        kept = informative_groups(scores_NG, 2)
        by_penalty.append(informative_groups(rewards_NG, 2) != kept)
        replaced.append(sum(n >= 2 for n in kept))
        assert row["replaced_groups"] == replaced[-1]
        kept_equal = [scores_NG[n].min() == scores_NG[n].max() for n in kept]
        assert row["frac_kept_zero_std"] == sum(kept_equal) / 2
        # Of all five groups.
        equal = [min(group) == max(group) for group in rewards_NG.tolist()]
        truncated = 1 - rollout.ended_NG.float().mean()
        for name, expected in {
            "reward": rewards_NG.mean(),
            "reward_std": rewards_NG.std(-1).mean(),
            "frac_reward_zero_std": sum(equal) / 5,
            "rewards/format": format_NG.mean(),
            "rewards/accuracy": accuracy_NG.mean(),
            "completions/mean_length": lengths_NG.float().mean(),
            "completions/clipped_ratio": truncated,
        }.items():
            assert row[name] == pytest.approx(float(expected)), name
        # Of the two that are kept.
        assert row["tokens"] == rollout.mask_NGT[kept].sum()
        assert row["sampler_gap"] < 1e-4  # log-probabilities belong to their completions
        advantages_NG = group_advantages(rewards_NG[kept])
        for n, group in zip(kept, advantages_NG.tolist(), strict=True):
            for g, text in enumerate(rollout.texts[n]):
                written = next(completions)
                assert (written["step"], written["completion"]) == (row["step"], text)
                assert written["id"] == rollout.prompts[n].question.source
                assert written["reward"] == pytest.approx(rewards_NG[n, g].item())
                assert written["advantage"] == pytest.approx(group[g])
    assert not list(completions)
    assert set(replaced) == {0, 1, 2}  # every case occurred
    assert any(by_penalty) == bool(penalised)


def test_a_group_that_only_the_length_penalty_tells_apart_gives_way_to_an_informative_one(
    tmp_path,
):
    fields = {"prompts_per_step": 2, "oversampling": 1.5, "group_size": 8}
    fields |= {"max_new_tokens": 200, "length_penalty": 0.5}
    config = load_config(write_run(tmp_path, **fields))
    shape = read_config(config.model)
    vocabulary = load_vocabulary(config.model, shape)
    encoder = prompt_encoder(vocabulary, shape, config)
    prompts = [encoder.encode(question) for question in load_questions(config).train[:3]]
    right, wrong = [], []
    for prompt in prompts:
        letter = prompt.question.answer
        right.append(f"<think>a</think><answer>{letter}</answer>")
        wrong.append(f"<think>a</think><answer>{'A' if letter != 'A' else 'B'}</answer>")
    texts = [[right[0]] * 8, [wrong[1]] * 8, [right[2]] * 4 + [wrong[2]] * 4]
    # In the first two groups, one completion is a token too long: a penalty of 0.01.
    lengths_NG = torch.full((3, 8), 100)
    lengths_NG[0, 3] = lengths_NG[1, 5] = 101
    mask_NGT = torch.arange(101) < lengths_NG[..., None]
    rollout = Groups(
        prompts=prompts,
        tokens_NGT=torch.zeros(mask_NGT.shape, dtype=torch.int64),
        mask_NGT=mask_NGT,
        logp_NGT=torch.zeros(mask_NGT.shape),
        ended_NG=torch.ones(3, 8, dtype=torch.bool),
        texts=texts,
    )
    step = Step(0, prompts, "cpu")
    kept, verdicts_NG, rewards_NG = score_rollout(step, rollout, config)
    assert kept.texts == [texts[0], texts[2]] and kept.prompts == [prompts[0], prompts[2]]
    assert [len(group) for group in verdicts_NG] == [8, 8]
    expected_NG = torch.tensor([[2.0] * 8, [2.0] * 4 + [1.0] * 4])
    expected_NG[0, 3] -= 0.01
    torch.testing.assert_close(rewards_NG, expected_NG)
    assert step.stats["replaced_groups"] == 1
    assert step.stats["reward"] == pytest.approx((16 - 0.01 + 8 - 0.01 + 12) / 24)
    assert step.stats["frac_reward_zero_std"] == 0  # the penalty is part of the reward


def test_a_written_reward_is_the_weighted_sum_of_the_written_scores_less_the_penalty(
    tmp_path, monkeypatch
):
    knobs = {"format_weight": 2.0, "accuracy_weight": 0.5, "length_penalty": 0.8}
    config = tiny(monkeypatch, tmp_path, **knobs)
    rollouts = observed_rollouts(monkeypatch)
    assert run(monkeypatch, config) == 0
    (rollout,) = rollouts
    lengths = rollout.mask_NGT.sum(-1).flatten().tolist()
    penalties = []
    for row, length in zip(rows(tmp_path / "run" / "completions.jsonl"), lengths, strict=True):
        scores = {rule: verdict["score"] for rule, verdict in row["rewards"].items()}
        penalties.append(max(0, length - 2) / 8)
        expected = 2 * scores["format"] + 0.5 * scores["accuracy"] - penalties[-1]
        assert row["reward"] == pytest.approx(expected)
    assert len(set(penalties)) > 2


def test_a_resumed_run_with_oversampling_draws_the_questions_of_the_whole_one(
    tmp_path, monkeypatch
):
    knobs = {"prompts_per_step": 2, "oversampling": 1.5, "steps": 4, "save_every": 2}
    drawn = {}
    for name in ("whole", "broken"):
        config = tiny(monkeypatch, tmp_path / name, **knobs)
        with monkeypatch.context() as patch:
            rollouts = observed_rollouts(patch)
            if name == "broken":
                with patch.context() as cut, pytest.raises(SystemExit):
                    run(power_cut_before(cut, call=3), config)
                assert len(rollouts) == 2
            assert run(patch, config) == 0
        drawn[name] = [[p.question.source for p in rollout.prompts] for rollout in rollouts]
    assert drawn["broken"] == drawn["whole"]
    questions = load_questions(load_config(tmp_path / "whole" / "config.toml")).train
    for step, sources in enumerate(drawn["whole"]):
        expected = questions_of_step(questions, step, 3, BASE["seed"])
        assert sources == [question.source for question in expected]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def power_cut_before(patch, call: int):
    """Make the sampler's `call`-th call end the process, as no exception that is caught does."""
    sample, calls = train.sample_groups, []

    def cut(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise SystemExit("power cut")
        return sample(*args, **kwargs)

    patch.setattr(train, "sample_groups", cut)
    return patch


def test_the_groups_that_are_kept_take_their_truncated_completions_with_them():
    mask_NGT = torch.ones(4, 2, 3, dtype=torch.bool)
    ended_NG = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    tokens_NGT = torch.arange(24).view(4, 2, 3)
    texts = [[f"{n}a", f"{n}b"] for n in range(4)]
    rollout = Groups(list("pqrs"), tokens_NGT, mask_NGT, -1.0 * tokens_NGT, ended_NG, texts)
    kept = rollout.select([1, 3])
    assert (kept.prompts, kept.texts) == (["q", "s"], [["1a", "1b"], ["3a", "3b"]])
    assert torch.equal(kept.tokens_NGT, tokens_NGT[[1, 3]])
    assert torch.equal(kept.logp_NGT, -1.0 * tokens_NGT[[1, 3]])
    assert torch.equal(kept.trained_mask(True), (mask_NGT & ended_NG[..., None])[[1, 3]])


def test_truncated_completions_that_are_masked_have_no_weight_but_count_in_their_group(
    tmp_path, monkeypatch
):
    config = tiny(monkeypatch, tmp_path, mask_truncated=True, inner_updates=1, micro_batch_tokens=1)
    rollouts, masks = observed_rollouts(monkeypatch), []

    def observed_weights(mask_NGT, **kwargs):
        masks.append((mask_NGT, token_weights(mask_NGT, **kwargs)))
        return masks[-1][1]

    monkeypatch.setattr(train, "token_weights", observed_weights)
    assert run(monkeypatch, config) == 0
    (rollout,), ((mask_NGT, weights_NGT),) = rollouts, masks
    ended_NG = rollout.ended_NG
    assert ended_NG.any() and not ended_NG.all()
    assert torch.equal(mask_NGT, rollout.mask_NGT & ended_NG[..., None])
    assert (weights_NGT[~ended_NG] == 0).all() and (weights_NGT[ended_NG].sum(-1) > 0).all()
    assert torch.equal(rollout.trained_mask(False), rollout.mask_NGT)
    # The advantages are those of whole groups.
    scores = [[sum(v.score for v in two_rules(t, "")) for t in texts] for texts in rollout.texts]
    advantages = group_advantages(torch.tensor(scores)).flatten().tolist()
    written = [row["advantage"] for row in rows(tmp_path / "run" / "completions.jsonl")]
    assert written == pytest.approx(advantages)
    # Somewhere, without the truncated ones they would be others.
    differs = False
    for n, group in enumerate(scores):
        some = torch.tensor(group)[ended_NG[n]]
        differs |= not torch.allclose(group_advantages(some), advantages_of(group)[ended_NG[n]])
    assert differs


def advantages_of(rewards: list[float]) -> Tensor:
    return group_advantages(torch.tensor(rewards))


@pytest.mark.parametrize("average", AVERAGES)
def test_completions_that_are_all_truncated_and_masked_give_finite_metrics_and_a_gradient_of_zero(
    tmp_path, monkeypatch, average
):
    knobs = {"mask_truncated": True, "loss_average": average}
    config = tiny(monkeypatch, tmp_path, ends=False, **knobs)
    assert run(monkeypatch, config) == 0
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert row["completions/clipped_ratio"] == 1 and row["reward_std"] > 0
    assert None not in row.values()
    assert row["loss"] == row["grad_norm"] == 0
    assert not (tmp_path / "run" / "incidents.jsonl").read_text()
