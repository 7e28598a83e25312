"""How fast a device is, in a few numbers that are measured in about a second, and what work then
takes.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from model.linear import arranged, linear

from .meter import Work


@dataclass(frozen=True)
class Speed:
    """Floating-point operations a second in products; bytes a second that products read, and that
    all other operators read and write; seconds that any operator takes.
    """

    flops: float
    read: float
    moved: float
    call: float
    source: str

    def seconds(self, work: Iterable[Work]) -> float:
        """A product takes as long as its arithmetic or its reading, whichever is longer."""
        return sum(
            self.call
            + (
                max(done.flops / self.flops, done.bytes / self.read)
                if done.flops
                else done.bytes / self.moved
            )
            for done in work
        )


ASSUMED = Speed(
    # NVIDIA's data sheet of the A100 80GB SXM: 312 TFLOP/s in bf16 and 2,039 GB/s. Half of the
    # first and three quarters of the second are what well-written code gets; a launch takes about 5
    # microseconds.
    flops=312e12 / 2, read=2039e9 * 3 / 4, moved=2039e9 * 3 / 4, call=5e-6, source="assumed: an A100 of 80 GB",
)  # fmt: skip


def speed_of(device: str, dtype: torch.dtype) -> Speed:
    """Measured, or assumed for a GPU that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return ASSUMED
    a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in "ab")
    few, weight = a[:16], torch.randn(16384, 1024, device=device).to(dtype)
    small = torch.ones(8, device=device)
    with torch.no_grad(), arranged([weight], rows=len(few)):
        product = _fastest(lambda: linear(a, b), device)
        read = _fastest(lambda: linear(few, weight), device)
        moved = _fastest(lambda: weight * weight, device)
        call = _fastest(lambda: small + 1, device)
    size = weight.nbytes
    return Speed(
        2 * 1024**3 / product, size / read, 3 * size / moved, call, f"measured on this {device}"
    )


def _fastest(run: Callable[[], object], device: str, seconds: float = 0.3) -> float:
    """Seconds of the fastest of the runs that fit into that time: others on the machine can only
    make it slower.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    run()  # libraries load
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - started)
    return best
