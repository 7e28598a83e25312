"""One step of a run: what it works on, what it leaves for the record, and where its time goes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data import Prompt
from grpo.rollout import Rollout
from rewards import Verdict

Verdicts = Sequence[Sequence[tuple[Verdict, ...]]]
"""Of N groups of G completions each one's verdicts, in the order of the rules."""
TENSORS = ("rewards_NG", "advantages_NG", "old_NGT", "ref_NGT")
"""What the loss takes beside the rollout."""


@dataclass
class Step:
    """Step `number`, from 0, on its N `prompts`.

    Attributes:
        seconds: by phase.
        stats: the update's numbers, scalars by their name in the metrics.
        finite: whether every update could be made; False if a loss or gradient was not finite.
        rollout, verdicts_NG: what was sampled (or, in SFT, given), and the rules' verdicts on it.
        tensors: those of `TENSORS` that the step needed, by name.
    """

    number: int
    prompts: Sequence[Prompt]
    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Tensor | float] = field(default_factory=dict)
    finite: bool = True
    rollout: Rollout | None = None
    verdicts_NG: Verdicts = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within as this phase's; phases of one name add up."""
        start = time.perf_counter()
        yield
        if self.device.startswith("cuda"):  # kernels are queued: wait for those of this phase
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def keep(self, rollout: Rollout, verdicts_NG: Verdicts = (), *tensors: Tensor | None) -> None:
        """Keep what the records are made from; the `tensors` are those of `TENSORS`, in order."""
        self.rollout, self.verdicts_NG = rollout, verdicts_NG
        named = zip(TENSORS, tensors, strict=False)  # supervised steps have none of them
        self.tensors = {name: x for name, x in named if x is not None}
