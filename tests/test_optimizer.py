"""AdamW on fp32 master weights."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from common.config import Config
from grpo.optimizer import MasterAdamW, scheduled_rate

SETTINGS = Config(model="m", train_questions="q", run_dir="r", adam_beta2=0.95, weight_decay=0.1)


def linear(dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


def backward(model: nn.Module, factor: float = 1.0) -> None:
    x = torch.linspace(-1, 1, 8).view(2, 4).to(model.weight.dtype)
    (factor * model(x).pow(2).sum()).backward()


def test_step_is_adamw_written_out_by_hand():
    model, optimizer = (m := linear()), MasterAdamW(m, SETTINGS)
    before = model.weight.detach().clone()
    backward(model)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    gradient = model.weight.grad.clone() / norm.clamp(min=1)
    assert norm > 1
    torch.testing.assert_close(optimizer.step(1e-2)["grad_norm"], norm)
    # At the first step the bias-corrected moments are the gradient and its square, so each weight
    # moves by the learning rate.
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected)
    assert model.weight.grad is None


def test_updates_too_small_for_bf16_are_not_lost_in_the_masters():
    model = linear(torch.bfloat16)
    optimizer, start = (
        MasterAdamW(model, Config(model="m", train_questions="q", run_dir="r", adam_beta2=0.95)),
        model.weight.detach().clone(),
    )
    for _ in range(100):
        backward(model)
        optimizer.accumulate()
        optimizer.step(1e-6)
    moved = (optimizer.masters[0] - start.float()).abs()
    torch.testing.assert_close(
        moved, torch.full_like(moved, 1e-4), rtol=0.2, atol=0
    )  # 100 steps of about the rate each
    assert (model.weight == start).float().mean() > 0.5  # in bf16 most weights have not moved
    assert torch.equal(model.weight, optimizer.masters[0].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rate", "least", "most"), [(1e-6, 0.95, 1.0), (1e-1, 0.0, 0.05), (1e-4, 0.05, 0.95)]
)
def test_bf16_lost_is_the_share_of_changed_weights_that_bf16_would_not_change(
    dtype, rate, least, most
):
    torch.manual_seed(0)
    model = nn.Linear(300, 20).to(dtype)  # more weights than the sample
    optimizer = MasterAdamW(model, SETTINGS)
    old = [master.detach().clone() for master in optimizer.masters]
    model(torch.randn(8, 300, dtype=dtype)).pow(2).sum().backward()
    optimizer.accumulate()
    share = float(optimizer.step(rate)["bf16_lost"])
    pairs = [(a, b.detach()) for a, b in zip(old, optimizer.masters, strict=True)]
    lost = [
        ((a.bfloat16() + (b - a).double()).bfloat16() == a.bfloat16()) & (a != b) for a, b in pairs
    ]
    counted = sum(int(x.sum()) for x in lost) / sum(int((a != b).sum()) for a, b in pairs)
    assert share == pytest.approx(counted, abs=0.05) and least <= share <= most


def copied(param, offload):
    """A master separate from its parameter, as if the model were on another device."""
    return param.detach().clone().requires_grad_()


def test_the_optimizer_in_host_memory_gives_the_same_weights(monkeypatch):
    """Simulated without a GPU: fp32 masters are copies, as if the model were on another device."""
    weights = []
    for apart in (False, True):
        model = linear()
        if apart:
            monkeypatch.setattr("grpo.optimizer._master", copied)
        optimizer = MasterAdamW(model, SETTINGS)
        for _ in range(3):
            backward(model)
            optimizer.accumulate()
            optimizer.step(1e-2)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_in_host_memory_updates_a_model_on_the_gpu(dtype):
    weights = []
    for offload in (False, True):
        model = linear(dtype).cuda()
        optimizer = MasterAdamW(model, replace(SETTINGS, offload_optimizer=offload))
        assert all(master.is_cuda != offload for master in optimizer.masters)
        for _ in range(3):
            (model(torch.ones(2, 4, dtype=dtype, device="cuda")).pow(2).sum()).backward()
            optimizer.accumulate()
            optimizer.step(1e-2)
        weights.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_many_small_bf16_gradients_add_up_in_fp32():
    model = linear(torch.bfloat16)
    optimizer = MasterAdamW(model, SETTINGS)
    backward(model)
    optimizer.accumulate()
    one = optimizer.masters[0].grad.clone()
    for _ in range(999):
        backward(model)
        optimizer.accumulate()
    torch.testing.assert_close(
        optimizer.masters[0].grad, 1000 * one, rtol=1e-4, atol=0
    )  # in bf16 it would stick at 256


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_visible_in_the_norm(bad):
    model = linear()
    optimizer, before = (
        MasterAdamW(model, SETTINGS),
        [p.detach().clone() for p in model.parameters()],
    )
    backward(model, bad)
    stats = optimizer.step(1e-2)
    assert not torch.isfinite(stats["grad_norm"]) and "bf16_lost" not in stats
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    backward(model)
    assert torch.isfinite(optimizer.step(1e-2)["grad_norm"])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_a_run_bit_for_bit(dtype):
    def steps(model, optimizer, count):
        for _ in range(count):
            backward(model)
            optimizer.accumulate()
            optimizer.step(1e-2)

    straight = linear(dtype)
    steps(straight, optimizer := MasterAdamW(straight, SETTINGS), 3)
    saved = {name: value.clone() for name, value in optimizer.state()}
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    steps(straight, optimizer, 3)
    resumed = linear(dtype)
    resumed.load_state_dict(weights)
    (again := MasterAdamW(resumed, SETTINGS)).load_state(saved)
    steps(resumed, again, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True)
    )


def test_an_fp32_run_can_resume_with_its_optimizer_in_host_memory(
    monkeypatch,
):
    model = linear()
    optimizer = MasterAdamW(model, SETTINGS)
    backward(model)
    optimizer.step(1e-2)
    monkeypatch.setattr("grpo.optimizer._master", copied)
    again = MasterAdamW(model, SETTINGS)
    again.load_state({name: value.clone() for name, value in optimizer.state()})
    for one in (again, optimizer):
        backward(model)
        one.accumulate()
    again.step(1e-2)
    assert all(torch.equal(p, m) for p, m in zip(model.parameters(), again.masters, strict=True))


@pytest.mark.parametrize("shape", [(3,), (5, 4), ()])
def test_moments_of_the_wrong_shape_are_refused_before_they_are_used(shape):
    optimizer = MasterAdamW(model := linear(), SETTINGS)
    backward(model)
    optimizer.step(1e-2)
    state = dict(optimizer.state()) | {"exp_avg.weight": torch.zeros(shape)}
    with pytest.raises(ValueError, match="wrong shape"):
        MasterAdamW(linear(), SETTINGS).load_state(state)


def test_learning_rate_rises_over_the_warm_up_then_falls_to_the_final_ratio():
    config = Config(
        model="m",
        train_questions="q",
        run_dir="r",
        learning_rate=1.0,
        warmup_steps=4,
        steps=9,
        final_lr_ratio=0.0,
    )
    rates = [scheduled_rate(step, config) for step in range(9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert {
        scheduled_rate(
            step, Config(model="m", train_questions="q", run_dir="r", learning_rate=2.0, steps=5)
        )
        for step in range(5)
    } == {2.0}
