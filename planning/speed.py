"""The speed of a device: three numbers, measured in about a second."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.linear import arranged, linear

CALL = 5e-6  # seconds of overhead per operator: a kernel launch on a GPU, dispatch on a CPU


class Speed(NamedTuple):
    """The speed of a device, and the source of these numbers.

    Attributes:
        flops: floating-point operations per second of matrix products.
        read: bytes per second that matrix products read.
        moved: bytes per second that all other operators read and write.
    """

    flops: float
    read: float
    moved: float
    source: str

    def seconds(self, flops: float, size: float) -> float:
        """Time of an operator; for a matrix product, that of its arithmetic or of its reading,
        whichever is longer (the roofline model, Williams et al. 2009).
        """
        if not flops:
            return CALL + size / self.moved
        return CALL + max(flops / self.flops, size / self.read)


# NVIDIA's data sheet of the A100 80GB SXM gives 312 TFLOP/s in bf16 and 2,039 GB/s. Well-written
# code reaches half of the former and three quarters of the latter.
ASSUMED = Speed(156e12, 1529e9, 1529e9, "assumed: an A100 with 80 GB")


def speed_of(device: str, dtype: torch.dtype) -> Speed:
    """The measured speed of a device, or an assumed one for a GPU that this machine lacks."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return ASSUMED
    square = torch.randn(1024, 1024, device=device, dtype=dtype)
    # As in decoding: a few rows times a matrix that is too large for a CPU's cache.
    rows, weight = square[:16], torch.randn(16384, 1024, device=device, dtype=dtype)
    with torch.no_grad(), arranged([weight], rows=len(rows)):
        return Speed(
            flops=2 * 1024**3 / _seconds(linear, square, square),
            read=weight.nbytes / _seconds(linear, rows, weight),
            moved=3 * weight.nbytes / _seconds(torch.mul, weight, weight),  # two reads, one write
            source=f"measured on this {device}",
        )


def _seconds(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    from torch.utils.benchmark import Timer  # imported here because it loads setuptools

    names = {"run": run, "x": x, "y": y}
    timer = Timer("run(x, y)", globals=names, num_threads=torch.get_num_threads())
    # The fastest run: other programs on the machine can only slow it down.
    return min(timer.blocked_autorange(min_run_time=0.3).times)
