"""Memory of log-probabilities and their gradients, beyond inputs and gradients: ours, or by full
logits.

    python -m benchmarks.logprob_memory [--full] --positions 4096 --vocabulary 151936 --hidden 512

Prints one JSON line. On a processor it is the process's own peak; run each way in a process of its
own.
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
    """All logits at once, with as few copies of them as autograd allows."""
    return (hidden_MD @ head_VD.T).log_softmax(dim=-1).gather(-1, tokens_M[:, None]).squeeze(-1)


def held(what: str) -> int:
    """Bytes of memory that this process holds now ("VmRSS"), or has held at most ("VmHWM"), as
    Linux counts.
    """
    status = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{what}:"))


def work() -> None:
    """Measure what the command line asks for, and print it."""
    parser = argparse.ArgumentParser("python -m benchmarks.logprob_memory")
    parser.add_argument("--full", action="store_true", help="by full logits")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=512)
    args = parser.parse_args()
    keep_freed_memory()  # as in a run
    hidden = torch.randn(args.positions, args.hidden, requires_grad=True)
    head = torch.empty(args.vocabulary, args.hidden).normal_(0, 0.02).requires_grad_()
    tokens = torch.randint(0, args.vocabulary, (args.positions,))
    allowed = torch.ones(args.vocabulary, dtype=torch.bool)
    # A product and its backward first: libraries take memory of their own when they are called.
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()

    before, started = held("VmRSS"), time.perf_counter()
    if args.full:
        logp = full_logprobs(hidden, head, tokens)
    else:
        logp, _ = token_logprobs(hidden, head, tokens, allowed)
    logp.sum().backward()
    seconds = time.perf_counter() - started
    extra = held("VmHWM") - before - hidden.nbytes - head.nbytes  # gradients are as large as these
    print(json.dumps({"extra_mb": extra / 1e6, "seconds": seconds, **vars(args)}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks", work))
