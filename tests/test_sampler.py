"""Grouped rollouts: the distribution, its log-probabilities, and independent completions."""

import gc
import weakref

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_run import tiny_model

from data import Vocabulary, allowed_tokens_V
from grpo.rollout import (
    collate,
    completion_logprobs,
    micro_batch_slices,
    with_image_features,
)
from grpo.sampler import (
    Growing,
    RolloutKind,
    growing_rows,
    inverse_cdf,
    sample_groups,
    sampling_noise,
)

END = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")


def sampled(model, prompts, places=None, group_size=5, max_new_tokens=7, ends=(END,), greedy=False):
    """A rollout at temperature 1.3, and the ids that may be sampled."""
    allowed = allowed_tokens_V(
        tiny_tokenizer(), model.config.vocab_size, [model.config.image_token_id]
    )
    places = range(len(prompts)) if places is None else places
    noise = None if greedy else sampling_noise(3, 11, places, group_size, max_new_tokens)
    vocabulary = Vocabulary(tiny_tokenizer(), ends, allowed.to(model.embed.weight.device))
    return sample_groups(
        model, vocabulary, prompts, noise, temperature=1.3, max_new_tokens=max_new_tokens
    ), allowed


def test_sampled_logprobs_equal_the_trainers_recomputed_ones(prompts):
    model = tiny_model()
    rollout, allowed = sampled(model, prompts)
    recomputed = torch.zeros_like(rollout.logp_NGT)
    with torch.no_grad():
        for batch in rollout.micro_batches(600):
            logp, _ = completion_logprobs(model, batch, allowed, temperature=1.3)
            batch.cut(recomputed).copy_(logp)
    assert rollout.mask_NGT.sum() > 60
    torch.testing.assert_close(recomputed, rollout.logp_NGT, atol=1e-4, rtol=0)


def test_sampled_logprobs_equal_a_plain_forward_over_prompt_and_completion(prompts):
    model = tiny_model(tie_word_embeddings=False)
    rollout, allowed = sampled(model, prompts)
    for n, prompt in enumerate(prompts):
        for g in range(5):
            kept = rollout.mask_NGT[n, g]
            tokens = rollout.tokens_NGT[n, g][kept]
            whole = torch.cat([prompt.tokens_P, tokens])[None]
            with torch.no_grad():
                logits = model(whole, prompt.patches_SC, prompt.grids_I3)[
                    0, len(prompt.tokens_P) - 1 : -1
                ]
            logp = (logits / 1.3).masked_fill(~allowed, -torch.inf).log_softmax(-1)
            torch.testing.assert_close(
                logp.gather(1, tokens[:, None])[:, 0],
                rollout.logp_NGT[n, g][kept],
                atol=1e-4,
                rtol=0,
            )


def test_greedy_decoding_picks_the_most_likely_token_of_a_plain_forward(prompts):
    model = tiny_model()
    rollout, allowed = sampled(model, prompts, greedy=True, max_new_tokens=12)
    for n, prompt in enumerate(prompts):
        tokens = rollout.tokens_NGT[n, 0][rollout.mask_NGT[n, 0]]
        whole = torch.cat([prompt.tokens_P, tokens])[None]
        with torch.no_grad():
            logits = model(whole, prompt.patches_SC, prompt.grids_I3)[
                0, len(prompt.tokens_P) - 1 : -1
            ]
        assert torch.equal(logits.masked_fill(~allowed, -torch.inf).argmax(-1), tokens)


def test_20000_samples_follow_the_softmax_they_were_drawn_from():
    """Pearson's chi-square over 30 tokens: 29 degrees of freedom, 99.9 % quantile 58.3 (tables)."""
    torch.manual_seed(0)
    logp = torch.randn(30).log_softmax(-1)
    noise = sampling_noise(0, 0, range(1), 20000, 1).flatten()
    counts = inverse_cdf(logp.repeat(20000, 1), noise)[0].bincount(minlength=30)
    expected = 20000 * logp.exp()
    assert ((counts - expected) ** 2 / expected).sum() < 58.3
    assert ((counts.roll(1) - expected) ** 2 / expected).sum() > 1000  # a wrong distribution fails


def test_first_tokens_of_a_large_group_follow_the_models_softmax(prompts):
    """The same through prompt, cache and masking. Tokens expected less than 5 times share a bin."""
    model = tiny_model()
    model.embed.weight.data *= 0.4  # flatter, so that many tokens are likely
    rollout, allowed = sampled(model, prompts[1:2], group_size=20000, max_new_tokens=1)
    with torch.no_grad():
        logits = model(prompts[1].tokens_P[None], prompts[1].patches_SC, prompts[1].grids_I3)[0, -1]
    expected = 20000 * (logits / 1.3).masked_fill(~allowed, -torch.inf).softmax(-1)
    counts = rollout.tokens_NGT.flatten().bincount(minlength=len(expected)).float()
    often = expected >= 5
    counts, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
    freedom = len(expected) - 1
    limit = (
        freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    )  # Wilson and Hilferty, 99.9 %
    assert freedom > 20
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < limit


def test_a_completion_depends_neither_on_its_batch_nor_on_its_group_size(prompts):
    model = tiny_model()
    together, _ = sampled(model, prompts)
    for n in range(3):
        alone, _ = sampled(model, prompts[n : n + 1], places=[n])
        assert alone.texts[0] == together.texts[n]
        T = alone.tokens_NGT.shape[-1]
        assert torch.equal(alone.mask_NGT[0], together.mask_NGT[n, :, :T])


def test_other_seeds_steps_prompts_and_samples_get_other_noise():
    noise = sampling_noise(1, 2, range(3), 4, 5)
    assert torch.equal(noise, sampling_noise(1, 2, range(3), 4, 5))
    assert torch.equal(noise[1:2], sampling_noise(1, 2, [1], 4, 5))
    assert noise.unique().numel() == noise.numel()
    assert not torch.equal(noise, sampling_noise(2, 2, range(3), 4, 5)) and not torch.equal(
        noise, sampling_noise(1, 3, range(3), 4, 5)
    )


def test_inverse_cdf_never_chooses_a_token_of_probability_0():
    logp = torch.tensor([-torch.inf, 0.5, -torch.inf, 0.5, -torch.inf]).log_softmax(-1)
    noise = torch.tensor([0.0, 0.49, 0.51, 1 - 2**-24])
    assert inverse_cdf(logp.repeat(4, 1), noise)[0].tolist() == [1, 1, 3, 3]


def test_forbidden_ids_are_never_sampled_even_if_they_are_likely(prompts):
    model = tiny_model(tie_word_embeddings=False)
    rollout, allowed = sampled(model, prompts, group_size=200)
    assert not allowed.all()
    with torch.no_grad():
        wanted = model(prompts[0].tokens_P[None])[0, -1].softmax(-1)[~allowed].sum()
    assert wanted > 0.01
    assert allowed[rollout.tokens_NGT].all()


def test_mask_reaches_to_the_first_end_of_turn_and_text_stops_before_it(prompts):
    model = tiny_model()
    ends = tuple(range(60))  # many ids that end a completion, so that lengths differ
    rollout, _ = sampled(model, prompts, ends=ends, group_size=40)
    lengths = rollout.mask_NGT.sum(-1)
    assert len(lengths.unique()) > 3
    is_end = torch.isin(rollout.tokens_NGT, torch.tensor(ends)) & rollout.mask_NGT
    for n in range(3):
        for g in range(40):
            length = int(lengths[n, g])
            assert rollout.mask_NGT[n, g, :length].all() and not is_end[n, g, : length - 1].any()
            assert is_end[n, g, length - 1] or length == 7
            kept = rollout.tokens_NGT[n, g, : length - int(is_end[n, g, length - 1])]
            assert rollout.texts[n][g] == tiny_tokenizer().decode(kept)
            assert (rollout.logp_NGT[n, g, length:] == 0).all()


def test_gradient_of_shared_prefix_micro_batches_equals_replicated_sequences(prompts):
    model = tiny_model()
    rollout, allowed = sampled(model, prompts)
    weights = torch.randn(rollout.mask_NGT.shape, generator=torch.Generator().manual_seed(0))
    for batch in rollout.micro_batches(600):
        logp, _ = completion_logprobs(model, batch, allowed, 1.3)
        (logp * batch.cut(weights)).sum().backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for n, prompt in enumerate(prompts):
        for g in range(5):
            kept = rollout.mask_NGT[n, g]
            tokens = rollout.tokens_NGT[n, g][kept]
            logits = model(
                torch.cat([prompt.tokens_P, tokens])[None], prompt.patches_SC, prompt.grids_I3
            )[0, len(prompt.tokens_P) - 1 : -1]
            logp = (logits / 1.3).masked_fill(~allowed, -torch.inf).log_softmax(-1)
            (logp.gather(1, tokens[:, None])[:, 0] * weights[n, g][kept]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            fast[name],
            parameter.grad,
            atol=2e-4,
            rtol=1e-3,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize(
    ("budget", "count"), [(1, 6), (585, 6), (586, 4), (588, 3), (882, 2), (10**9, 1)]
)
def test_micro_batches_are_as_many_whole_groups_as_fit(prompts, budget, count):
    """Prompts take 243, 258 and 259 tokens, each of the five completions 7."""
    rollout, _ = sampled(tiny_model(), [*prompts, *prompts], places=range(6))
    prompt_sizes = [len(prompt.tokens_P) for prompt in rollout.prompts]
    longest = rollout.mask_NGT.sum(-1).amax(-1).tolist()
    parts = [batch.groups for batch in rollout.micro_batches(budget)]
    assert [n for part in parts for n in range(6)[part]] == list(range(6)) and len(parts) == count
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        one_more = slice(part.start, part.stop + 1)
        size = [
            len(range(6)[s]) * (max(prompt_sizes[s]) + 5 * max(longest[s]))
            for s in (part, one_more)
        ]
        assert size[0] <= budget or part.stop - part.start == 1
        assert after is None or size[1] > budget  # the next group would not have fitted
    for batch in rollout.micro_batches(budget):
        assert torch.equal(batch.tokens_NGT, batch.cut(rollout.tokens_NGT))
        assert batch.mask_NGT.sum() == rollout.mask_NGT[batch.groups].sum()


@pytest.mark.parametrize(
    ("budget", "sizes"), [(63, [1, 1, 1]), (64, [2, 1]), (131, [2, 1]), (132, [3]), (1, [1, 1, 1])]
)
def test_the_size_of_a_micro_batch_includes_the_padding_of_prompts_and_completions(budget, sizes):
    """Two groups need 2 (20 + 3 * 4) tokens, all three need 3 (20 + 3 * 8)."""
    slices = micro_batch_slices([10, 20, 5], [4, 2, 8], group_size=3, tokens_each=budget)
    assert [part.stop - part.start for part in slices] == sizes


@pytest.mark.parametrize(("budget", "sizes"), [(77, [2, 2]), (78, [3, 1])])
def test_the_size_of_a_micro_batch_does_not_depend_on_other_groups(budget, sizes):
    """The first three of four groups need 3 (20 + 2 * 3) tokens, the last two 2 (30 + 2 * 3)."""
    slices = micro_batch_slices([5, 20, 10, 30], [2, 1, 3, 1], group_size=2, tokens_each=budget)
    assert [part.stop - part.start for part in slices] == sizes


def test_a_batch_is_on_the_models_device_except_for_its_grids(prompts):
    batch = collate(prompts, "meta")  # stands for a GPU
    tensors = batch.tokens_NP, batch.positions_3NP, batch.lengths_N, batch.images
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.grids_I3.device.type == "cpu"
    (encoded,) = with_image_features(tiny_model().to("meta"), prompts[1:2])
    assert encoded.features_ID.device.type == "meta"


def test_a_kept_rollout_state_is_reused_only_for_rollouts_that_it_fits():
    model = tiny_model()
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    vocabulary, other = (Vocabulary(tiny_tokenizer(), (END,), allowed) for _ in range(2))
    kind = RolloutKind((3, 2, 4), 1.0, greedy=False)
    kept = Growing(model, vocabulary, kind, 50)
    for rollout in ((vocabulary, kind, 50), (vocabulary, kind, 7)):
        model.rollout_state = kept
        assert growing_rows(model, *rollout) is kept
    for rollout in (
        (other, kind, 50),
        (vocabulary, kind, 51),
        (vocabulary, kind._replace(shape=(3, 2, 5)), 50),
        (vocabulary, kind._replace(temperature=0.9), 50),
        (vocabulary, kind._replace(greedy=True), 50),
    ):
        model.rollout_state = kept
        assert growing_rows(model, *rollout) is not kept and model.rollout_state is None


def test_dropping_a_model_frees_its_rollout_state_without_the_garbage_collector(
    prompts,
):
    """On a GPU, a reference cycle would hold gigabytes until the next garbage collection."""
    model = tiny_model()
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    vocabulary = Vocabulary(tiny_tokenizer(), (END,), allowed)
    size = max(len(prompt.tokens_P) for prompt in prompts)
    kind = RolloutKind((len(prompts), 2, 4), 1.0, greedy=True)
    model.rollout_state = Growing(model, vocabulary, kind, size)
    with torch.no_grad():
        model.rollout_state.begin(model, collate(prompts), None)
        model.rollout_state.advance(model, 0)
    dropped = weakref.ref(model), weakref.ref(model.rollout_state)
    gc.disable()
    try:
        del model
        assert [reference() for reference in dropped] == [None, None]
    finally:
        gc.enable()
