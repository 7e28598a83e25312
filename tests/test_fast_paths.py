"""Every fast path of a step against its slow twin: same values, same gradients, same tokens."""

import pytest
import torch
from test_model_twins import assert_close_gradients, gradients, random_tokens, replicated_logits
from test_sampler import sampled
from tiny import tiny_tokenizer
from tiny_models import MIXED, VOCABULARY, make_batch, tiny_config
from tiny_models import tiny_model as bare_model
from tiny_run import tiny_model
from torch import Tensor
from torch.utils._pytree import tree_leaves

import grpo.sampler
import model.linear
from data import Vocabulary
from grpo.rollout import (
    MicroBatch,
    Rollout,
    collate,
    completion_logprobs,
    with_image_features,
)
from grpo.sampler import inverse_cdf, naive_inverse_cdf
from model import Qwen2VL
from model.attention import merged_attention, two_part_attention
from model.linear import Linear, arranged, linear
from model.rope import batch_positions

SHAPES = {"1:1-tied": (4, 4, True), "4:2-untied": (4, 2, False), "6:1-tied": (6, 1, True)}
LENGTHS = {
    "ragged": [[6, 1, 3], [2, 5, 1], [1, 1, 4], [3, 6, 2]],
    "all of one token": [[1, 1], [1, 1], [1, 1], [1, 1]],
    "groups of one": [[4], [1], [6], [2]],
    "full": [[5, 5], [5, 5], [5, 5], [5, 5]],
}


def whole(prompts, rollout: Rollout) -> MicroBatch:
    """The whole rollout as one micro-batch, with these prompts."""
    return MicroBatch(slice(None), collate(prompts), rollout.tokens_NGT, rollout.mask_NGT)


def mask_of(lengths: list[list[int]]) -> Tensor:
    longest = max(max(group) for group in lengths)
    return torch.arange(longest) < torch.tensor(lengths)[..., None]


def packed_hidden(model: Qwen2VL, batch, completions: Tensor, mask: Tensor) -> Tensor:
    positions = batch_positions(batch.tokens, batch.lengths, batch.grids, model.config)
    images = None if batch.patches is None else batch.patches.to(model.embed.weight.dtype)
    return model.completion_hidden(
        batch.tokens, positions, batch.lengths, images, batch.grids, completions, mask
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_completions_equal_replicated_sequences_in_values_and_gradients(
    shape, lengths
) -> None:
    """Prompts without an image, with one and with three; a vocabulary of 307."""
    model, batch, mask = bare_model(tiny_config(*shape)), make_batch(MIXED), mask_of(lengths)
    completions = random_tokens(*mask.shape)
    weights = torch.randn(int(mask.sum()), VOCABULARY, generator=torch.Generator().manual_seed(2))
    slow = replicated_logits(model, batch, completions)[mask]
    slow_gradients = gradients(model, (slow * weights).sum())
    fast = packed_hidden(model, batch, completions, mask) @ model.head_weight.T
    fast_gradients = gradients(model, (fast * weights).sum())
    assert (fast - slow).abs().max() < 1e-4
    assert_close_gradients(fast_gradients, slow_gradients)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_completions_in_bf16_are_as_close_to_fp32_as_replicated_ones(lengths) -> None:
    exact_model, batch, mask = bare_model(tiny_config(4, 2)), make_batch(MIXED), mask_of(lengths)
    completions = random_tokens(*mask.shape)
    exact = replicated_logits(exact_model, batch, completions)[mask]
    model = bare_model(tiny_config(4, 2)).bfloat16()
    fast = packed_hidden(model, batch, completions, mask) @ model.head_weight.T
    slow = replicated_logits(model, batch, completions)[mask]
    assert fast.dtype == torch.bfloat16
    # Deep random towers amplify rounding errors. Packing must not add any of its own.
    assert 0 < (fast.float() - exact).norm() < 1.3 * (slow.float() - exact).norm() < exact.norm()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gradients_of_packed_completions_in_bf16_are_as_close_to_fp32_as_replicated_ones(
    lengths,
) -> None:
    batch, mask = make_batch(MIXED), mask_of(lengths)
    completions = random_tokens(*mask.shape)
    weights = torch.randn(int(mask.sum()), VOCABULARY, generator=torch.Generator().manual_seed(2))
    results = []
    for packed, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)):
        model = bare_model(tiny_config(4, 2)).to(dtype)
        if packed:
            logits = packed_hidden(model, batch, completions, mask) @ model.head_weight.T
        else:
            logits = replicated_logits(model, batch, completions)[mask]
        results.append(gradients(model, (logits.float() * weights).sum()))
    exact, slow, fast = ({name: x.float() for name, x in result.items()} for result in results)
    error = {name: [(x[name] - exact[name]).norm() for x in (fast, slow)] for name in exact}
    whole = [sum(pair[i] ** 2 for pair in error.values()) ** 0.5 for i in range(2)]
    size = sum(x.norm() ** 2 for x in exact.values()) ** 0.5
    assert 0 < whole[0] < 1.3 * whole[1] < 0.3 * size


def test_decoding_and_update_agree_on_log_probabilities_in_bf16(prompts) -> None:
    model = tiny_model().bfloat16()
    rollout, allowed = sampled(model, prompts, max_new_tokens=20)
    with torch.no_grad():
        logp, _ = completion_logprobs(model, whole(prompts, rollout), allowed, 1.3)
    gap = (logp - rollout.logp_NGT)[rollout.mask_NGT].abs()
    assert 0 < gap.mean() < 0.03


def test_scores_of_bf16_keys_are_fp32() -> None:
    """Near 30, bf16 numbers are 1/8 apart: a sampler that rounds scores would be another policy."""
    generator = torch.Generator().manual_seed(0)
    q = (6 * torch.randn(1, 2, 2, 2, 64, generator=generator)).bfloat16()
    keys = [torch.randn(1, 2, 300, 64, generator=generator).bfloat16() for _ in range(4)]
    parts = [
        keys[0],
        keys[1],
        keys[2].expand(2, 2, 300, 64),
        keys[3].expand(2, 2, 300, 64),
        torch.zeros(1, 1, 1, 300),
    ]
    narrow = two_part_attention(q, *parts)
    exact = two_part_attention(q.double(), *(x.double() for x in parts))
    assert (narrow.double() - exact).norm() < 0.004 * exact.norm()


def test_masked_values_are_never_read() -> None:
    model, batch, mask = bare_model(), make_batch(MIXED), mask_of(LENGTHS["ragged"])
    completions = random_tokens(*mask.shape)
    other = torch.where(mask, completions, 7)
    assert torch.equal(
        *(packed_hidden(model, batch, tokens, mask) for tokens in (completions, other))
    )


def test_recomputed_activations_give_exactly_the_gradients_of_kept_ones(prompts) -> None:
    rollout, allowed = sampled(tiny_model(), prompts)
    runs = []
    for recompute in (False, True):
        model = tiny_model()
        model.recompute = recompute
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x) or x, lambda x: x
        ):
            logp, _ = completion_logprobs(
                model,
                whole(prompts, rollout),
                allowed,
                temperature=1.3,
            )
        runs.append((len(kept), gradients(model, logp.sum())))
    assert runs[1][0] < 0.4 * runs[0][0]
    assert all(torch.equal(runs[1][1][name], gradient) for name, gradient in runs[0][1].items())


def test_precomputed_image_features_give_the_same_log_probabilities_and_gradients(
    prompts,
) -> None:
    rollout, allowed = sampled(tiny_model(), prompts)
    model, results = tiny_model(), []
    model.visual.requires_grad_(False)
    for inputs in (prompts, with_image_features(model, prompts)):
        logp, _ = completion_logprobs(model, whole(inputs, rollout), allowed, 1.3)
        results.append((logp.detach(), gradients(model, logp.sum())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)
    assert not any(name.startswith("visual.") for name in results[1][1])
    assert_close_gradients(results[1][1], results[0][1])
    model.visual.forward = None  # running it again fails
    completion_logprobs(model, whole(inputs, rollout), allowed, 1.3)
    assert with_image_features(model, prompts[:1]) == list(
        prompts[:1]
    )  # a prompt without an image needs no tower


@pytest.mark.parametrize("greedy", [False, True])
def test_dropping_finished_completions_does_not_change_the_others(
    prompts, monkeypatch, greedy
) -> None:
    model, ends, sizes = tiny_model(), tuple(range(0, 300, 12)), []
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda tokens, *rest: sizes.append(len(tokens)) or decode(tokens, *rest)
    )
    options = dict(group_size=6, max_new_tokens=70, ends=ends, greedy=greedy)
    monkeypatch.setattr(grpo.sampler, "SHRINK_AT", 0.0)
    slow, _ = sampled(model, prompts, **options)
    assert len(set(sizes)) == 1
    for check_every in (1, 3):
        sizes.clear()
        monkeypatch.setattr(grpo.sampler, "CHECK_EVERY", check_every)
        monkeypatch.setattr(grpo.sampler, "SHRINK_AT", 1.0)
        fast, _ = sampled(model, prompts, **options)
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > (1 if greedy else 3)
        assert torch.equal(fast.tokens_NGT, slow.tokens_NGT) and torch.equal(
            fast.mask_NGT, slow.mask_NGT
        )
        assert torch.equal(fast.ended_NG, slow.ended_NG) and fast.texts == slow.texts
        torch.testing.assert_close(fast.logp_NGT, slow.logp_NGT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 307, 1024])
def test_two_level_sampling_chooses_the_same_tokens_as_one_running_sum(V: int) -> None:
    generator = torch.Generator().manual_seed(V)
    logits = 4 * torch.randn(4000, V, generator=generator)
    if V > 2:
        logits[:, ::3] = -1e30
        logits[:, 0], logits[0, :-1] = -1e30, -1e30  # one row that allows only the last id
    noise = torch.rand(4000, generator=generator)
    noise[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    logp = logits.log_softmax(-1)
    chosen, chosen_logp = inverse_cdf(logits.clone(), noise)
    agree = chosen == naive_inverse_cdf(logp, noise)
    assert agree.float().mean() > 0.999  # up to rounding at the boundaries
    assert (logp.gather(1, chosen[:, None]) > -1e20).all()
    torch.testing.assert_close(
        chosen_logp, logp.gather(1, chosen[:, None])[:, 0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 7), (1,), (3, 0)])
def test_our_matrix_product_equals_torchs_in_values_and_gradients(
    shape, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer, twin = Linear(24, 37, bias=bias).to(dtype), torch.nn.Linear(24, 37, bias=bias).to(dtype)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(*shape, 24).to(dtype).requires_grad_()
    weight = torch.randn(*shape, 37).to(dtype)
    ours, theirs = layer(x), twin(x)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours, theirs, **tolerance)
    actual = torch.autograd.grad((ours * weight).sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad((theirs * weight).sum(), [x, *twin.parameters()])
    torch.testing.assert_close(actual, expected, **tolerance)


def test_our_matrix_product_takes_any_strides() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(24, 10), torch.randn(24, 37)
    torch.testing.assert_close(linear(x.T, weight.T), x.T @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        linear(x.T[::2], weight.T[3:9]), (x.T @ weight)[::2, 3:9], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_merged_attention_equals_one_softmax_over_both_parts(
    heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    N, G, P, S, d, generator = 2, 3, 7, 5, 8, torch.Generator().manual_seed(0)
    prompt_size, own_size = (N, kv_heads, P, d), (N * G, kv_heads, S, d)
    sizes = [(N, G, kv_heads, heads // kv_heads, d), prompt_size, prompt_size, own_size, own_size]
    q, prompt_k, prompt_v, own_k, own_v = (
        torch.randn(size, generator=generator).to(dtype) for size in sizes
    )
    real = torch.arange(P) < torch.tensor([[7], [4]])
    bias = torch.zeros(N, 1, 1, P, dtype=dtype).masked_fill_(~real[:, None, None], float("-inf"))
    fast = merged_attention(q, prompt_k, prompt_v, own_k, own_v, bias)
    slow = two_part_attention(q, prompt_k, prompt_v, own_k, own_v, bias)
    torch.testing.assert_close(
        fast,
        slow,
        **(dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_on_a_gpu_never_waits_for_the_host(dtype: torch.dtype) -> None:
    """torch's meta device stands in for the GPU: it has no values, so reading one is an error."""
    with torch.device("meta"), torch.no_grad():
        network = Qwen2VL(tiny_config(4, 2)).to(dtype)
        growing = fake_growing(network)
        growing.decode_and_choose(network, span=64, padded=True)
        with pytest.raises(RuntimeError, match="meta tensors"):
            bool(growing.done_R.all())  # this device notices a wait
        with pytest.raises(RuntimeError, match="device"):
            growing.noise = growing.noise + torch.zeros(1, 70, device="cpu")


def fake_growing(model: Qwen2VL, N: int = 2, G: int = 3, P: int = 9, T: int = 70):
    """A rollout after its prefill, made by hand, because real prompts would need values."""
    vocabulary = Vocabulary(tiny_tokenizer(), (3, 4), torch.ones(VOCABULARY, dtype=torch.bool))
    growing = grpo.sampler.Growing(
        model, vocabulary, grpo.sampler.RolloutKind((N, G, T), 0.7, False), P
    )
    growing.rows = N * G
    tokens = torch.zeros(N, P, dtype=torch.int64)
    growing.cache.begin(torch.full((N,), P))
    model._run_layers(model.embed(tokens), torch.zeros(3, N, P), growing.cache.prefill)
    return growing


def test_reused_buffers_stay_in_place_and_do_not_affect_the_next_rollout(
    prompts, monkeypatch
) -> None:
    """A captured graph relies on this: all tensors that a step reads or writes keep their place."""
    monkeypatch.setattr(grpo.sampler, "CHECK_EVERY", 2)
    monkeypatch.setattr(grpo.sampler, "SHRINK_AT", 1.0)
    options = dict(group_size=6, max_new_tokens=40, ends=tuple(range(0, 300, 12)))
    model = tiny_model()
    batches = [prompts, prompts[::-1], [prompts[0]] * 3]  # the last is shorter than the buffers
    expected = [sampled(model, batch, **options)[0] for batch in batches]
    vocabulary = Vocabulary(
        tiny_tokenizer(), options["ends"], sampled(model, prompts, **options)[1]
    )
    size = max(len(prompt.tokens_P) for prompt in prompts)
    growing = grpo.sampler.Growing(
        model, vocabulary, grpo.sampler.RolloutKind((3, 6, 40), 1.3, False), size
    )
    monkeypatch.setattr(grpo.sampler, "growing_rows", lambda *_, **__: growing)
    places = []
    for batch, slow in zip(batches, expected, strict=True):
        fast, _ = sampled(model, batch, **options)
        assert growing.rows < 18  # some rows were dropped
        assert torch.equal(fast.tokens_NGT, slow.tokens_NGT) and torch.equal(
            fast.mask_NGT, slow.mask_NGT
        )
        torch.testing.assert_close(fast.logp_NGT, slow.logp_NGT, rtol=0, atol=1e-5)
        state = tree_leaves([vars(growing), vars(growing.cache)])
        places.append([x.data_ptr() for x in state if isinstance(x, torch.Tensor)])
    assert places[0] == places[1] == places[2] and len(places[0]) > 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_replayed_graphs_sample_the_tokens_of_eager_steps(prompts, monkeypatch) -> None:
    rollouts = []
    for graphs in (True, False):
        model = tiny_model().cuda()
        if not graphs:
            monkeypatch.setattr(
                grpo.sampler.Growing,
                "advance",
                lambda self, model, t: self.decode_and_choose(model, span=t + 1),
            )
        rollouts.append(
            sampled(
                model, prompts, group_size=6, max_new_tokens=200, ends=tuple(range(0, 300, 12))
            )[0]
        )
    assert torch.equal(rollouts[0].tokens_NGT, rollouts[1].tokens_NGT)
    torch.testing.assert_close(rollouts[0].logp_NGT, rollouts[1].logp_NGT, rtol=0, atol=1e-4)


def test_arranged_weights_give_the_same_products_and_are_removed_afterwards() -> None:
    layer, x = Linear(24, 37), torch.randn(6, 24)
    with torch.no_grad():
        expected = layer(x)
        if not model.linear._HAS_ONEDNN:
            pytest.skip("this build of torch has no oneDNN")
        with pytest.raises(KeyError), arranged([layer.weight], rows=6):
            assert hasattr(layer.weight, "arranged")
            for rows in (6, 3, 1):
                torch.testing.assert_close(layer(x[:rows]), expected[:rows], rtol=1e-5, atol=1e-6)
            layer.weight.arranged = torch.ops.mkldnn._reorder_linear_weight(
                2 * layer.weight.detach(), 6
            )
            assert not torch.allclose(layer(x), expected)  # the arranged copy is what is used
            raise KeyError
        assert not hasattr(layer.weight, "arranged")
        assert torch.equal(layer(x), expected)
        with pytest.raises(RuntimeError), arranged([layer.weight, torch.zeros(2, 2, 2)], rows=6):
            pass  # the second can't be arranged
        assert not hasattr(layer.weight, "arranged")


def test_all_weights_that_decoding_multiplies_by_are_arranged(prompts, monkeypatch) -> None:
    """A weight that is not arranged would give the same results, but slowly."""
    if not model.linear._HAS_ONEDNN:
        pytest.skip("this build of torch has no oneDNN")
    network, plain, product = tiny_model(), [], model.linear._product
    decoding = []
    decode = network.decode
    monkeypatch.setattr(network, "decode", lambda *args: decoding.append(1) or decode(*args))
    monkeypatch.setattr(
        model.linear,
        "_product",
        lambda x, weight, bias=None: (
            plain.append(bool(decoding) and weight.layout == torch.strided)
            or product(x, weight, bias)
        ),
    )
    sampled(network, prompts)
    assert len(plain) > 50 and not any(plain)


def test_a_bias_alone_can_learn() -> None:
    layer = Linear(3, 5).requires_grad_(False)
    layer.bias.requires_grad_()
    layer(torch.randn(4, 3)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((5,), 4.0))
