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


@dataclass
class Step:
    """Step `number`, from 0, on its N `prompts`.

    Attributes:
        seconds: by phase.
        stats: the update's numbers, scalars by their name in the metrics.
        finite: whether every update could be made; False if a loss or gradient was not finite.
        rollout, verdicts_NG: what was sampled (or, in SFT, given), and the rules' verdicts on it.
        tensors: what the loss took beside the rollout, (N, G) or (N, G, T), by name.
    """

    number: int
    prompts: Sequence[Prompt]
    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Tensor | float] = field(default_factory=dict)
    finite: bool = True
    rollout: Rollout | None = None
    verdicts_NG: Sequence[Sequence[tuple[Verdict, ...]]] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within as this phase's; phases of one name add up."""
        start = time.perf_counter()
        yield
        if self.device.startswith("cuda"):  # kernels are queued: wait for those of this phase
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def keep(
        self,
        rollout: Rollout,
        verdicts_NG: Sequence[Sequence[tuple[Verdict, ...]]] = (),
        rewards_NG: Tensor | None = None,
        advantages_NG: Tensor | None = None,
        old_NGT: Tensor | None = None,
        ref_NGT: Tensor | None = None,
    ) -> None:
        """Leave what the records are made from; what the step did not need is None."""
        self.rollout, self.verdicts_NG = rollout, verdicts_NG
        tensors = {
            "rewards_NG": rewards_NG,
            "advantages_NG": advantages_NG,
            "old_NGT": old_NGT,
            "ref_NGT": ref_NGT,
        }
        self.tensors = {name: x for name, x in tensors.items() if x is not None}
