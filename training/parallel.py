"""Several processes that train one model: `torchrun --nproc-per-node 2 train.py --config FILE`.

Each process, a rank, samples and trains whole groups of every step. What is small is exchanged, so
that all ranks know the whole step: its completions, rewards and masks. The divisor of the loss is
then that of one process, and the gradients of the ranks only have to be added.

No other module knows how many processes there are. A single one exchanges nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from common.config import Config
from common.errors import InputError, reason
from common.program import Stopped
from grpo.optimizer import Whole
from grpo.rollout import Rollout

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another, which may be writing a checkpoint or answering questions."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them: `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the run folder and the terminal."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's share of `count` groups: neighbours, as many as any other's or one more.

        By number and not by length: the rollout's buffers and graphs fit a number of groups.
        """
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. Not for large tensors."""
        if self.count == 1:
            return [value]
        values: list[Value | None] = [None] * self.count
        with _lost_ranks_named():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, the same bits on all."""
        if self.count > 1:
            with _lost_ranks_named():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def total(self, result: Value, device: str) -> Value:
        """The sum over the ranks of a tensor, or of each tensor in a tuple or in a dict.

        A dict may be empty on a rank that had nothing to do; `device` is where its zeros belong.
        """
        if self.count == 1:
            return result
        if isinstance(result, dict):
            names = max(self.gather(list(result)), key=len)
            zero = torch.zeros((), device=device)
            result = {name: result.get(name, zero.clone()) for name in names}  # type: ignore
        tensors = result.values() if isinstance(result, dict) else result
        self.add([tensors] if isinstance(tensors, Tensor) else list(tensors))  # type: ignore
        return result

    def add_gradients(self, weights: Sequence[Tensor]) -> None:
        """Add the gradients of the ranks. A weight without one on any rank is left without."""
        if self.count == 1:
            return
        here = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32)
        self.add([here])
        for weight, ranks in zip(weights, here.tolist(), strict=True):
            if ranks:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                self.add([weight.grad])

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the enclosed work fails on one rank, all end, and the first prints one message.

        The work must not exchange anything. InputError; other ranks than the first end silently.
        """
        error = None
        try:
            yield
        except InputError as caught:
            error = caught
        messages = [str(one) for one in self.gather(error) if one]
        if messages:
            raise InputError(messages[0]) if self.leads else SystemExit(2)

    def refuse_differences(self, contents: dict[str, str]) -> None:
        """InputError if `contents` (name -> digest) are not the same on all ranks."""
        of_first = self.gather(contents)[0]
        with self.together():
            for name, digest in contents.items():
                if digest != of_first[name]:
                    raise InputError(
                        f"rank {self.rank} has different {name} than rank 0: give all the same"
                    )

    def whole(
        self, rollout: Rollout, verdicts_NG: Sequence[Value]
    ) -> tuple[Rollout, Sequence[Value]]:
        """The rollouts and verdicts of all ranks as one; its `own` groups are this rank's."""
        if self.count == 1:
            return rollout, verdicts_NG
        device, prompts = rollout.tokens_NGT.device, rollout.prompts
        sent = replace(rollout, prompts=[prompt.without_images() for prompt in prompts])
        parts = self.gather((sent.to("cpu"), verdicts_NG))
        begin = sum(len(part.prompts) for part, _ in parts[: self.rank])
        own = slice(begin, begin + len(prompts))
        all_prompts = [prompt for part, _ in parts for prompt in part.prompts]
        all_prompts[own] = prompts  # with their images
        longest = max(part.mask_NGT.shape[-1] for part, _ in parts)

        def joined(name: str) -> Tensor:
            tensors = [getattr(part, name) for part, _ in parts]
            return torch.cat([pad(x, (0, longest - x.shape[-1])) for x in tensors]).to(device)

        whole = Rollout(
            prompts=all_prompts,
            tokens_NGT=joined("tokens_NGT"),
            mask_NGT=joined("mask_NGT"),
            logp_NGT=joined("logp_NGT"),
            ended_NG=torch.cat([part.ended_NG for part, _ in parts]).to(device),
            texts=[texts for part, _ in parts for texts in part.texts],
            own=own,
        )
        return whole, [verdicts for _, of_rank in parts for verdicts in of_rank]

    def with_images(self, rollout: Rollout) -> Rollout:
        """The rollout with the images of all its prompts, also those of other ranks."""
        if self.count == 1:
            return rollout
        # The features of a frozen vision tower are not needed, and belong to one GPU.
        own = [replace(prompt, features_ID=None) for prompt in rollout.prompts[rollout.own]]
        return replace(rollout, prompts=[prompt for part in self.gather(own) for prompt in part])


ALONE = Ranks()


class Shards(Whole):
    """Each rank has a slice of every master and moment (ZeRO, arXiv 1910.02054, stage 2).

    The model's own weights stay whole on every rank, because the rollout needs them. So nothing has
    to be gathered for a forward or backward pass: a micro-batch's gradient is summed and
    scattered, and after each update the new weights are gathered once.
    """

    gathers = True

    def __init__(self, ranks: Ranks, device: str) -> None:
        # A second to import, and of no use to a single process.
        from torch.distributed import tensor
        from torch.distributed.device_mesh import init_device_mesh

        self._ranks, self._tensor = ranks, tensor
        self._mesh = init_device_mesh(device.partition(":")[0], (ranks.count,))

    def part(self, x: Tensor) -> Tensor:
        sliced = [self._tensor.Shard(0)]
        return self._tensor.distribute_tensor(x, self._mesh, sliced, src_data_rank=None)

    def gradients(self, params: Sequence[Tensor]) -> Iterator[Tensor | None]:
        present = torch.tensor([param.grad is not None for param in params], dtype=torch.int32)
        self._ranks.add([present])
        for param, ranks in zip(params, present.tolist(), strict=True):
            if not ranks:
                yield None
                continue
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad = None
            own = self._tensor.DTensor.from_local(
                grad.float(), self._mesh, [self._tensor.Partial()], run_check=False
            )
            with _lost_ranks_named():
                yield own.redistribute(placements=[self._tensor.Shard(0)])

    def full(self, x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, self._tensor.DTensor) else x

    def local(self, x: Tensor) -> Tensor:
        return x.detach().to_local()  # type: ignore[attr-defined]

    def total(self, x: Tensor) -> Tensor:
        return self._ranks.total(x, str(x.device))


@contextmanager
def _lost_ranks_named() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch has no class for it that all backends raise
        raise InputError(
            f"the exchange with another process failed ({reason(error)}): its message is above, or "
            "in the other machine's log; the same command resumes from the newest checkpoint"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere:  # noqa: SIM117
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started; a single one without torchrun.

    Only the first keeps its output; the others' errors are still printed.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    store, rank, count = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    # torchrun keeps the store when it restarts the processes. Under the same keys these would find
    # the addresses of those that have died, and wait for them.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, None, TIMEOUT, count, rank, store)
    ranks = Ranks(rank, count)
    try:
        if ranks.leads:
            yield ranks
        else:
            with _silence():
                yield ranks
    except Stopped as stopped:
        if ranks.leads:
            raise
        raise SystemExit(128 + stopped.signal) from None  # the first has said it
    finally:
        dist.destroy_process_group()


def of_this_rank(config: Config, ranks: Ranks) -> Config:
    """The config with this rank's own GPU. InputError if it names one for all."""
    if ranks.count == 1 or config.device == "cpu":
        return config
    if config.device != "cuda":
        raise InputError(f"device is {config.device}: with several processes, give cuda or cpu")
    return replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
