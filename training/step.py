"""One step of a run: its prompts, its results for the logs, and its timings."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data import Prompt
from grpo.rollout import Rollout
from rewards import Verdict

from .parallel import ALONE, Ranks

Verdicts = Sequence[Sequence[tuple[Verdict, ...]]]
"""For each of N groups of G completions, the verdicts of all rules, in the order of the rules."""
TENSORS = ("rewards_NG", "advantages_NG", "old_NGT", "ref_NGT")
"""The loss's inputs besides the rollout."""


@dataclass
class Step:
    """Step `number` (from 0) and its `prompts`, the spare ones of dynamic sampling included.

    Attributes:
        places: of the prompts in the step. Questions whose images can't be read leave gaps.
        seconds: time by phase.
        stats: statistics of the update: metric name -> scalar.
        finite: False if a loss or gradient was not finite, so that an update was skipped.
        rollout, verdicts_NG: the completions (sampled, or in SFT given) and the rules' verdicts.
        tensors: those of `TENSORS` that the step used, by name.
    """

    number: int
    prompts: Sequence[Prompt]
    device: str
    places: Sequence[int] = ()
    ranks: Ranks = ALONE
    seconds: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Tensor | float] = field(default_factory=dict)
    finite: bool = True
    rollout: Rollout | None = None
    verdicts_NG: Verdicts = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the enclosed code; phases of the same name add up."""
        start = time.perf_counter()
        yield
        if self.device.startswith("cuda"):  # kernels run asynchronously: wait for them
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def keep(self, rollout: Rollout, verdicts_NG: Verdicts = (), *tensors: Tensor | None) -> None:
        """Keep the results for the logs; `tensors` are those named in `TENSORS`, in that order."""
        self.rollout, self.verdicts_NG = rollout, verdicts_NG
        named = zip(TENSORS, tensors, strict=False)  # SFT steps have none of them
        self.tensors = {name: x for name, x in named if x is not None}
