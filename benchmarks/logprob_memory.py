"""Measure the memory of log-probabilities with gradients, ours or from full logits (--full).

    python -m benchmarks.logprob_memory [--full] --positions 4096 --vocabulary 151936 --hidden 512

Prints one JSON line: the peak memory of this process on the CPU, without the inputs and their
gradients.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from common.program import run_program
from model import keep_freed_memory, token_logprobs


def full_logprobs(hidden_MD: Tensor, head_VD: Tensor, tokens_M: Tensor) -> Tensor:
    """Log-probabilities from all logits at once, with as few copies as autograd allows."""
    return (hidden_MD @ head_VD.T).log_softmax(dim=-1).gather(-1, tokens_M[:, None]).squeeze(-1)


def memory_bytes(field: str) -> int:
    """Memory of this process in bytes: now ("VmRSS") or at its peak ("VmHWM"). Linux only."""
    status = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def work() -> None:
    """Run the command line: measure, and print the result."""
    parser = argparse.ArgumentParser("python -m benchmarks.logprob_memory")
    parser.add_argument("--full", action="store_true", help="compute all logits at once")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=512)
    args = parser.parse_args()
    keep_freed_memory()  # as in a run
    hidden = torch.randn(args.positions, args.hidden, requires_grad=True)
    head = torch.empty(args.vocabulary, args.hidden).normal_(0, 0.02).requires_grad_()
    tokens = torch.randint(0, args.vocabulary, (args.positions,))
    allowed = torch.ones(args.vocabulary, dtype=torch.bool)
    # A first product with backward: libraries allocate memory of their own when first called.
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()

    before, started = memory_bytes("VmRSS"), time.perf_counter()
    if args.full:
        logp = full_logprobs(hidden, head, tokens)
    else:
        logp, _ = token_logprobs(hidden, head, tokens, allowed)
    logp.sum().backward()
    seconds = time.perf_counter() - started
    gradients = hidden.nbytes + head.nbytes  # as large as the inputs
    extra = memory_bytes("VmHWM") - before - gradients
    print(json.dumps({"extra_mb": extra / 1e6, "seconds": seconds, **vars(args)}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks", work))
