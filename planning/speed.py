"""How fast a device is, in three numbers that are measured in about a second."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.linear import arranged, linear

CALL = 5e-6  # seconds that any operator takes: a launch on a GPU, torch's dispatch on a processor


class Speed(NamedTuple):
    """Floating-point operations of products a second; bytes a second that products read, and that
    all other operators read and write; where these numbers are from.
    """

    flops: float
    read: float
    moved: float
    source: str

    def seconds(self, flops: float, size: float) -> float:
        """A product takes as long as its arithmetic or its reading, whichever is longer (the
        roofline model, Williams et al. 2009).
        """
        if not flops:
            return CALL + size / self.moved
        return CALL + max(flops / self.flops, size / self.read)


# NVIDIA's data sheet of the A100 80GB SXM says 312 TFLOP/s in bf16 and 2,039 GB/s. Well-written
# code gets half of the first and three quarters of the second.
ASSUMED = Speed(156e12, 1529e9, 1529e9, "assumed: an A100 of 80 GB")


def speed_of(device: str, dtype: torch.dtype) -> Speed:
    """Measured, or assumed for a GPU that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return ASSUMED
    square = torch.randn(1024, 1024, device=device, dtype=dtype)
    # As in decoding: a few rows meet a matrix that is too large for a processor's cache.
    rows, weight = square[:16], torch.randn(16384, 1024, device=device, dtype=dtype)
    with torch.no_grad(), arranged([weight], rows=len(rows)):
        return Speed(
            flops=2 * 1024**3 / _seconds(linear, square, square),
            read=weight.nbytes / _seconds(linear, rows, weight),
            moved=3 * weight.nbytes / _seconds(torch.mul, weight, weight),  # it writes as well
            source=f"measured on this {device}",
        )


def _seconds(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    from torch.utils.benchmark import Timer  # here, because it loads setuptools

    names = {"run": run, "x": x, "y": y}
    timer = Timer("run(x, y)", globals=names, num_threads=torch.get_num_threads())
    # The fastest of all runs: others on the machine can only make it slower.
    return min(timer.blocked_autorange(min_run_time=0.3).times)
