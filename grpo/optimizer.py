"""AdamW on fp32 master weights, with warm-up and gradient clipping.

At a learning rate of 1e-6 an update is far smaller than the distance between neighbouring bf16
numbers (0.4 to 0.8 % of a weight). Added to bf16 weights, it would be rounded away. So the
optimiser keeps fp32 copies, the masters, updates those, and rounds them into the model. If the
model itself is fp32, its parameters are the masters and nothing is copied.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.config import Config

SAMPLED = 1024
"""Weights per tensor that `bf16_lost` is estimated from, evenly spaced (up to twice as many)."""


class Weight(NamedTuple):
    """A parameter of the model and its master, the fp32 tensor that the optimiser updates."""

    name: str
    param: Tensor
    master: Tensor


class Whole:
    """How masters and moments are spread over processes: not at all."""

    gathers = False  # whether `full` makes a new tensor

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a master or a moment."""
        return x

    def gradients(self, params: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """This process's part of each gradient, summed over processes; None without a gradient."""
        return (param.grad for param in params)

    def full(self, x: Tensor) -> Tensor:
        """The whole of a master, a moment or a norm, from its parts."""
        return x

    def local(self, x: Tensor) -> Tensor:
        """This process's part, as a plain tensor."""
        return x.detach()

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' numbers."""
        return x


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for a model of any floating-point type.

    Call `accumulate` after each micro-batch's backward pass, and `step` once per update. With
    `config.offload_optimizer` masters, moments and accumulated gradients are kept in host memory,
    and the GPU holds only the model and the gradients of one micro-batch. With several processes,
    each may hold only its `spread.part` of them.
    """

    def __init__(self, model: nn.Module, config: Config, spread: Whole | None = None) -> None:
        self.spread = spread or Whole()
        self.weights: list[Weight] = []
        for name, param in model.named_parameters():
            if param.requires_grad:
                master = _master(param, config.offload_optimizer)
                if spread:
                    master = spread.part(master.detach()).requires_grad_()
                self.weights.append(Weight(name, param, master))
        self.masters = [weight.master for weight in self.weights]
        self.max_grad_norm = config.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.masters,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def accumulate(self) -> None:
        """Add the model's gradients to those of the masters: a long sum in bf16 would lose bits."""
        gradients = self.spread.gradients([weight.param for weight in self.weights])
        for (_, param, master), grad in zip(self.weights, gradients, strict=True):
            if master is not param and grad is not None:
                # Convert to fp32 after the move: bf16 is half the bytes to copy to the host.
                grad = grad.to(master.device)
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                param.grad = None

    def forget_gradients(self) -> None:
        """Drop all gradients, including any that an interrupted backward pass left behind."""
        for _, param, master in self.weights:
            param.grad = master.grad = None

    def step(self, learning_rate: float) -> dict[str, Tensor]:
        """Clip the gradient, update the masters, round them into the model, drop the gradients.

        If the gradient is not finite, the update is skipped.

        Returns:
            "grad_norm", the norm before clipping. If the update was made, also "bf16_lost": the
            share of changed weights that would not have changed in bf16, because rounding would
            have undone the update (estimated from a sample; each tensor counts by its size).
        """
        norm = self.spread.full(nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm))
        stats = {"grad_norm": norm}
        if torch.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = learning_rate
            before = self._sample()  # a copy: AdamW works in place
            self.adamw.step()
            stats["bf16_lost"] = self._lost_in_bf16(before)
            with torch.no_grad():
                for _, param, master in self.weights:
                    if master is not param:
                        param.copy_(self.spread.full(master))
        self.forget_gradients()
        return stats

    def _sample(self) -> Tensor:
        """A sample of every master's weights, fp32 (n,)."""
        parts = [self.spread.local(master) for master in self.masters]
        return torch.cat([part.flatten()[:: _stride(part)] for part in parts])

    def _lost_in_bf16(self, before: Tensor) -> Tensor:
        update = self._sample() - before
        rounded = before.bfloat16()
        lost = (rounded.float() + update).bfloat16() == rounded
        # A sampled weight stands for as many weights as its tensor's stride.
        counts = []
        for master in map(self.spread.local, self.masters):
            stride = _stride(master)
            sampled = -(-master.numel() // stride)
            counts.append(torch.full((sampled,), stride, device=master.device))
        changed = (update != 0) * torch.cat(counts)
        lost, changed = self.spread.total(torch.stack(((lost * changed).sum(), changed.sum())))
        return lost / changed.clamp(min=1)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a resumed run needs, by name: moments, step count, masters.

        The masters of an fp32 model are saved with the model. One by one, because all of them
        together may be more than one process can hold.
        """
        for name, param, master in self.weights:
            for key, value in self.adamw.state.get(master, {}).items():
                yield f"{key}.{name}", self.spread.full(value.detach())
            if param.dtype != torch.float32:
                yield f"master.{name}", self.spread.full(master.detach())

    def state_bytes(self) -> int:
        """Size of `state` after the first update: two moments per weight, and separate masters."""
        size = 0
        for _, param, _ in self.weights:
            size += 4 * param.numel() * (2 + (param.dtype != torch.float32))
        return size

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        The state of an fp32 model loads with or without `offload_optimizer`, however it was saved:
        its weights equal their masters.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a moment has the wrong shape.
        """
        for name, param, master in self.weights:
            if f"step.{name}" in tensors:
                moments = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors[f"{key}.{name}"]
                    # Without this check AdamW would broadcast, and use another weight's moments.
                    if value.shape != (() if key == "step" else master.shape):
                        raise ValueError(f"the moments of {name} have the wrong shape")
                    value = value.to(master.device).float()
                    moments[key] = value if key == "step" else self.spread.part(value)
                self.adamw.state[master] = moments
            # The model was loaded from the same checkpoint: it is already the rounded master.
            if param.dtype != torch.float32:
                whole = tensors[f"master.{name}"].to(master.device)
                master.copy_(self.spread.part(whole))


def _master(param: Tensor, offload: bool) -> Tensor:
    """The fp32 tensor to update: the parameter itself if possible, otherwise a copy."""
    offload = offload and param.device.type != "cpu"
    if param.dtype == torch.float32 and not offload:
        return param
    device = "cpu" if offload else param.device
    return param.detach().to(device, torch.float32).requires_grad_()


def _stride(tensor: Tensor) -> int:
    return max(1, tensor.numel() // SAMPLED)


def scheduled_rate(step: int, config: Config) -> float:
    """The learning rate of a step (counted from 0): linear warm-up, then linear decay.

    The decay ends at `final_lr_ratio` of the peak, one step after the last, so that even a decay to
    0 wastes no rollout.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + (config.final_lr_ratio - 1) * done)
