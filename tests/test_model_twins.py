"""Every fast path of the model against its slow twin: values and gradients."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    FORBIDDEN,
    MIXED,
    VOCABULARY,
    Batch,
    make_batch,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Qwen2VL, token_logprobs
from model.attention import two_part_attention
from model.cache import GroupCache
from model.logprobs import naive_logprobs
from model.rope import batch_positions

BATCHES = {"text": MIXED[1::2], "one-prompt": MIXED[:1], "mixed": MIXED}
SIZES = {"G1-T1": (1, 1), "G1-T6": (1, 6), "G3-T1": (3, 1), "G3-T6": (3, 6)}
SHAPES = {"1:1-tied": (4, 4, True), "4:2-untied": (4, 2, False), "6:1-tied": (6, 1, True)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("G", "T"), SIZES.values(), ids=SIZES)
def test_shared_prefix_equals_replicated_sequences_in_values_and_gradients(
    shape, prompts, G: int, T: int
) -> None:
    model, batch = tiny_model(tiny_config(*shape)), make_batch(prompts)
    completions = random_tokens(len(prompts), G, T)
    weights = torch.randn(
        len(prompts), G, T, VOCABULARY, generator=torch.Generator().manual_seed(2)
    )

    slow = replicated_logits(model, batch, completions)
    slow_gradients = gradients(model, (slow * weights).sum())
    fast = completion_hidden(model, batch, completions) @ model.head_weight.T
    fast_gradients = gradients(model, (fast * weights).sum())

    assert (fast - slow).abs().max() < 1e-4
    assert_close_gradients(fast_gradients, slow_gradients)


def test_shared_prefix_hides_other_completions_and_the_future() -> None:
    model, batch = tiny_model(), make_batch(MIXED)
    completions = random_tokens(len(MIXED), 3, 6)
    before = completion_hidden(model, batch, completions)
    completions[1, 2, 3] = (completions[1, 2, 3] + 1) % 280
    changed = (completion_hidden(model, batch, completions) != before).any(dim=-1)
    assert changed[1, 2, 4:].all() and int(changed.sum()) == 2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("G", "T"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_prefill_and_decode_equal_the_plain_forward(shape, G: int, T: int, padded: bool) -> None:
    model, batch = tiny_model(tiny_config(*shape)), make_batch(MIXED)
    completions = random_tokens(len(MIXED), G, T)
    positions = batch_positions(batch.tokens, batch.lengths, batch.grids, model.config)
    cache = GroupCache(
        len(MIXED), batch.tokens.shape[1] + 3 * padded, G, T, torch.float32, batch.tokens.device
    )
    last = model.prefill(batch.tokens, positions, batch.lengths, batch.patches, batch.grids, cache)
    states = [last[:, None].expand(-1, G, -1)]
    for step in range(T - 1):
        after = (positions.amax(dim=(0, 2)) + 1 + step).repeat_interleave(G)
        hidden = model.decode(
            completions[:, :, step].flatten(), after, cache, *((T, True) if padded else (step + 1,))
        )
        states.append(hidden.view(len(MIXED), G, -1))
    logits = torch.stack(states, dim=2) @ model.head_weight.T
    assert (logits - replicated_logits(model, batch, completions)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_the_contents_of_the_padding_change_nothing(shape) -> None:
    model, batch = tiny_model(tiny_config(*shape)), make_batch(MIXED)
    completions = random_tokens(len(MIXED), 2, 4)
    padded = batch._replace(tokens=batch.tokens.masked_fill(~batch.mask, 99))
    assert torch.equal(
        completion_hidden(model, padded, completions), completion_hidden(model, batch, completions)
    )
    logits = [model(b.tokens, b.patches, b.grids, b.lengths)[batch.mask] for b in (padded, batch)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("S", [1, 5])
def test_two_part_attention_equals_attention_over_the_joined_keys(kv_heads: int, S: int) -> None:
    N, G, H, P, d, generator = 2, 3, 4, 7, 8, torch.Generator().manual_seed(0)
    shapes = [
        (N, G, H, 1, d),
        (N, kv_heads, P, d),
        (N, kv_heads, P, d),
        (N * G, kv_heads, S, d),
        (N * G, kv_heads, S, d),
    ]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    prompt_mask = torch.arange(P) < torch.tensor([[7], [4]])
    bias = torch.zeros(N, 1, 1, P).masked_fill(~prompt_mask[:, None, None], float("-inf"))
    own_mask = torch.arange(S) < 3
    weight = torch.randn(shapes[0], generator=generator)

    q, prompt_k, prompt_v, own_k, own_v = inputs
    k, v = (
        torch.cat((prompt.repeat_interleave(G, dim=0), own), dim=2)
        .repeat_interleave(H // kv_heads, dim=1)
        .unflatten(0, (N, G))
        for prompt, own in ((prompt_k, own_k), (prompt_v, own_v))
    )
    mask = torch.cat(
        (prompt_mask[:, None, None, None, :].expand(N, G, H, 1, P), own_mask.expand(N, G, H, 1, S)),
        dim=-1,
    )
    slow = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    slow_gradients = torch.autograd.grad((slow * weight).sum(), inputs)
    by_head = q.view(N, G, kv_heads, -1, d)
    fast = two_part_attention(by_head, *inputs[1:], bias, own_mask).reshape(q.shape)
    fast_gradients = torch.autograd.grad((fast * weight).sum(), inputs)

    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-5, atol=1e-5)
    full = two_part_attention(by_head, *inputs[1:], torch.zeros_like(bias), own_mask).reshape(
        q.shape
    )
    assert not torch.allclose(full[1], fast[1])
    every = two_part_attention(by_head, *inputs[1:], bias).reshape(q.shape)
    assert torch.allclose(every, fast) == (S == 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("M", "ids"), [(13, 512), (13, 64), (13, 10), (13, 1), (13, 0), (1, 4), (0, 4)]
)
def test_blocked_logprobs_equal_the_naive_ones_in_values_and_gradients(
    M: int, ids: int, temperature: float
) -> None:
    hidden, head, tokens, allowed, weight = logprob_inputs(M)
    slow, slow_entropy = naive_logprobs(hidden, head, tokens, allowed, temperature)
    fast, fast_entropy = token_logprobs(
        hidden, head, tokens, allowed, temperature, 4 * max(M, 1) * ids
    )
    assert fast.shape == fast_entropy.shape == (M,)
    assert not fast_entropy.requires_grad and not slow_entropy.requires_grad
    torch.testing.assert_close((fast, fast_entropy), (slow, slow_entropy), rtol=0, atol=1e-4)
    slow_gradients = torch.autograd.grad((slow * weight).sum(), (hidden, head))
    fast_gradients = torch.autograd.grad((fast * weight).sum(), (hidden, head))
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-4, atol=2e-5)
    assert not fast_gradients[1][FORBIDDEN].any()


@pytest.mark.parametrize("logprobs", [naive_logprobs, token_logprobs])
def test_logprobs_and_their_gradients_equal_a_float64_softmax_over_the_allowed_ids(
    logprobs: Callable,
) -> None:
    hidden, head, tokens, allowed, weight = logprob_inputs(5)

    def exact(hidden64: Tensor, head64: Tensor) -> Tensor:
        """By hand, with the forbidden rows removed from the head instead of masked."""
        scores = (hidden64 @ head64[allowed].T / 0.7).exp()
        column = allowed.cumsum(0)[tokens] - 1
        return (scores.gather(1, column[:, None]).squeeze(1) / scores.sum(dim=1)).log()

    wide = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        exact, wide, fast_mode=True
    )  # check the expectation itself with finite differences
    logp, entropy = logprobs(hidden, head, tokens, allowed, 0.7)
    expected = exact(*wide)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-5)
    probabilities = (wide[0] @ wide[1][allowed].T / 0.7).softmax(dim=-1)
    torch.testing.assert_close(
        entropy.double(), -(probabilities * probabilities.log()).sum(dim=-1), rtol=0, atol=1e-4
    )
    ours = torch.autograd.grad((logp * weight).sum(), (hidden, head))
    theirs = torch.autograd.grad((expected * weight).sum(), wide)
    torch.testing.assert_close([g.double() for g in ours], list(theirs), rtol=1e-4, atol=1e-5)


def test_blocked_logprobs_in_bf16_are_as_close_to_fp32_as_the_naive_ones() -> None:
    hidden, head, tokens, allowed, weight = logprob_inputs(40)
    exact, _ = naive_logprobs(hidden, head, tokens, allowed, 0.7)
    exact_gradients = torch.autograd.grad((exact * weight).sum(), (hidden, head))
    narrow = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    fast, entropy = token_logprobs(*narrow, tokens, allowed, 0.7, 40 * 4 * 16)
    slow, _ = naive_logprobs(*narrow, tokens, allowed, 0.7)
    assert fast.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-4)
    torch.testing.assert_close(fast, exact, rtol=0, atol=0.2)
    gradients = torch.autograd.grad((fast * weight).sum(), narrow)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - expected).norm() < 0.02 * expected.norm()


def test_logprobs_of_tens_of_nats_neither_overflow_nor_lose_their_gradient() -> None:
    hidden, head, tokens, allowed, _ = logprob_inputs(6)
    logp, entropy = token_logprobs(hidden * 100, head, tokens, allowed, 0.7, 6 * 4 * 5)
    gradients = torch.autograd.grad(logp.sum(), (hidden, head))
    assert logp.min() < -100 and logp.max() <= 0
    assert all(x.isfinite().all() for x in (logp, entropy, *gradients))


def test_no_tensor_of_all_positions_and_all_ids_is_computed_or_kept() -> None:
    M, ids = 64, 8
    hidden, head, tokens, allowed, weight = logprob_inputs(M)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks, Sizes() as forward:
        logp, _ = token_logprobs(hidden, head, tokens, allowed, 0.7, M * 4 * ids)
    with Sizes() as backward:
        (logp * weight).sum().backward()
    for sizes in (forward, backward):
        assert M * ids in sizes and max(sizes) <= head.numel() < M * VOCABULARY
    assert saved and max(x.numel() for x in saved) <= head.numel()


class Sizes(TorchDispatchMode):
    """Context manager that records the number of elements of every computed tensor."""

    def __enter__(self) -> set[int]:
        super().__enter__()
        self.sizes: set[int] = set()
        return self.sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.sizes.update(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 280, shape, generator=torch.Generator().manual_seed(1))


def logprob_inputs(M: int, D: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (M, D), head (V, D), tokens (M,), allowed (V,), weights of the log-probs (M,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(M, D, generator=generator),
        torch.randn(VOCABULARY, D, generator=generator),
    )
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    allowed[FORBIDDEN] = False
    tokens = torch.randint(0, 280, (M,), generator=generator)
    if M > 1:
        tokens[0], tokens[1] = 0, VOCABULARY - 1
    return (
        hidden.requires_grad_(),
        head.requires_grad_(),
        tokens,
        allowed,
        torch.randn(M, generator=generator),
    )


def completion_hidden(model: Qwen2VL, batch: Batch, completions: Tensor) -> Tensor:
    positions = batch_positions(batch.tokens, batch.lengths, batch.grids, model.config)
    every = torch.ones(completions.shape, dtype=torch.bool)
    hidden = model.completion_hidden(
        batch.tokens, positions, batch.lengths, batch.patches, batch.grids, completions, every
    )
    return hidden.view(*completions.shape, -1)


def replicated_logits(model: Qwen2VL, batch: Batch, completions: Tensor) -> Tensor:
    """Logits (N, G, T, V) that predict each completion token, from whole sequences one by one."""
    rows = []
    for n, group in enumerate(completions):
        prompt, patches, grids = batch.row(n)
        for completion in group:
            rows.append(
                model(torch.cat((prompt, completion))[None], patches, grids)[
                    0, len(prompt) - 1 : -1
                ]
            )
    return torch.stack(rows).unflatten(0, completions.shape[:2])


def gradients(model: Qwen2VL, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(fast: dict[str, Tensor], slow: dict[str, Tensor]) -> None:
    """Compare within 1e-4 of the largest value of each parameter's gradient."""
    assert fast.keys() == slow.keys() and fast
    for name, gradient in slow.items():
        error = (fast[name] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max() + 1e-5, (
            f"{name}: {error} of {gradient.abs().max()}"
        )


def test_importing_attention_switches_cudnns_attention_off() -> None:
    """cuDNN's backward can return NaN with a mask. In a new process, as the switch is global."""
    script = (
        "import torch; before = torch.backends.cuda.cudnn_sdp_enabled(); import model.attention;"
        "print(before, torch.backends.cuda.cudnn_sdp_enabled())"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, check=True)
    assert run.stdout.split() == [b"True", b"False"]
