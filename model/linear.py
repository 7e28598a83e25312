"""Matrix products, where most of the time goes.

On a processor, fp32 products go to oneDNN (torch's mkldnn), the library that torch itself uses for
bf16 there, in place of MKL, which is slow on AMD processors. BENCHMARKS.md has what that is worth
in a step. Everything else is torch's own `linear`, the twin.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@contextmanager
def arranged(weights: Iterable[Tensor], rows: int) -> Iterator[None]:
    """Within, `linear` without gradient finds these weights in oneDNN's own order, best for so many
    rows of input.

    Decoding multiplies the same weights by a few rows again and again; oneDNN would rearrange them
    every time. They must not change within, and each is held twice. On a GPU, and in bf16, this
    does nothing.
    """
    weights = [weight for weight in weights if _suits_onednn(weight)]
    try:
        for weight in weights:
            arranged_weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            vars(weight)["arranged"] = arranged_weight
        yield
    finally:
        for weight in weights:
            vars(weight).pop("arranged", None)


def _suits_onednn(x: Tensor) -> bool:
    return _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out), differentiable
    in all three.
    """
    if not (_suits_onednn(x) and _suits_onednn(weight) and x.numel()):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, getattr(weight, "arranged", weight), bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`; strides may be any, so that a transposed matrix need not be copied."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x_rows = x.reshape(-1, x.shape[-1])
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(rows, weight.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(rows.T, x_rows.T)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next tensor of the process, in place of returning
    each to the system.

    A step on a processor makes and frees thousands of tensors of the same sizes; handing every one
    of them back and faulting its pages in again costs time (BENCHMARKS.md). Elsewhere than on
    Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)  # glibc: torch is built for no other
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions take
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
