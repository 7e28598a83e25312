"""Matrix products, where most of the time goes.

On a CPU, fp32 products use oneDNN (torch's mkldnn) instead of MKL, which is slow on AMD processors.
torch itself uses oneDNN for bf16 there. BENCHMARKS.md says how much time this saves per step.
Everything else is torch's own `linear`, the slow twin.
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
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@contextmanager
def arranged(weights: Iterable[Tensor], rows: int) -> Iterator[None]:
    """Context in which `linear` without gradient uses copies of the weights in oneDNN's own layout.

    Decoding multiplies the same weights by a few rows again and again, and oneDNN would otherwise
    rearrange them every time. The layout is chosen for `rows` rows of input. Inside the context the
    weights must not change, and each is in memory twice. On a GPU, and in bf16, this does nothing.
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
    """x (..., in) @ weight (out, in) transposed + bias (out,) -> (..., out), differentiable."""
    if not (_suits_onednn(x) and _suits_onednn(weight) and x.numel()):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, getattr(weight, "arranged", weight), bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, for any strides, so that a transposed matrix need not be copied."""
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
    """Make glibc keep large freed blocks for later tensors instead of returning them to the system.

    A step on a CPU allocates and frees thousands of tensors of the same sizes. Returning each block
    and faulting its pages in again costs time (BENCHMARKS.md). Does nothing outside Linux.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)  # glibc: torch is not built for any other
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions accept
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
