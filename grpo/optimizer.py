"""AdamW on fp32 master weights, with warm-up and gradient clipping.

At a learning rate of 1e-6 an update is far smaller than the distance between neighbouring bf16
numbers (0.4 to 0.8 % of a weight): added to bf16 weights it would be rounded away. So the optimiser
owns fp32 copies, adds to those, and rounds them into the model. Where the model itself is fp32, its
parameters are the masters and nothing is copied.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.config import Config

SAMPLED = 1024
"""Weights of each tensor that `bf16_lost` looks at, evenly spread over it."""


class Weight(NamedTuple):
    """A tensor of the model, and the fp32 one that the optimiser updates."""

    name: str
    param: Tensor
    master: Tensor


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for a model of any floating-point type.

    Call `accumulate` after each micro-batch's backward, `step` once per update. With
    `config.offload_optimizer` all that is fp32 here lives in the host's memory, and the GPU holds
    the model and its fresh gradients alone.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.weights: list[Weight] = []
        for name, param in model.named_parameters():
            if param.requires_grad:
                self.weights.append(Weight(name, param, _master(param, config.offload_optimizer)))
        self.masters = [weight.master for weight in self.weights]
        self.max_grad_norm = config.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.masters,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def accumulate(self) -> None:
        """Add the model's fresh gradients to the masters', in fp32: a long sum in bf16 would lose
        bits.
        """
        for _, param, master in self.weights:
            if master is not param and param.grad is not None:
                # Moved as it is and made fp32 there: half the bytes cross to the host.
                grad = param.grad.to(master.device)
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                param.grad = None

    def forget_gradients(self) -> None:
        """Drop what was accumulated since the last update, and what a broken backward has left."""
        for _, param, master in self.weights:
            param.grad = master.grad = None

    def step(self, learning_rate: float) -> dict[str, Tensor]:
        """Clip, update, round into the model, forget the gradients.

        A gradient that is not finite changes nothing: the update is left out.

        Returns:
            "grad_norm", before clipping; and of an update that was made "bf16_lost", the share of
            changed weights that bf16 weights would have kept as they were, the update being rounded
            away (of a sample, each tensor counting by its size).
        """
        norm = nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        stats = {"grad_norm": norm}
        if torch.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = learning_rate
            before = self._sample()  # a copy: AdamW works in place
            self.adamw.step()
            stats["bf16_lost"] = self._lost_in_bf16(before)
            with torch.no_grad():
                for _, param, master in self.weights:
                    if master is not param:
                        param.copy_(master)
        self.forget_gradients()
        return stats

    def _sample(self) -> Tensor:
        """Some weights of every master, fp32 (n,)."""
        return torch.cat([master.detach().flatten()[:: _stride(master)] for master in self.masters])

    def _lost_in_bf16(self, before: Tensor) -> Tensor:
        update = self._sample() - before
        rounded = before.bfloat16()
        lost = (rounded.float() + update).bfloat16() == rounded
        # A sampled weight stands for as many as its tensor's stride skips.
        counts = []
        for master in self.masters:
            stride = _stride(master)
            sampled = -(-master.numel() // stride)
            counts.append(torch.full((sampled,), stride, device=master.device))
        changed = (update != 0) * torch.cat(counts)
        return (lost * changed).sum() / changed.sum().clamp(min=1)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by parameter name: moments, step count, separate masters."""
        tensors = {}
        for name, param, master in self.weights:
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value.detach()
            if master is not param:
                tensors[f"master.{name}"] = master.detach()
        return tensors

    def state_bytes(self) -> int:
        """The size of `state` once an update was made: two moments, and separate masters."""
        return sum(master.nbytes * (2 + (master is not param)) for _, param, master in self.weights)

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave. KeyError if anything is missing, ValueError if misshapen.

        fp32 weights are their own masters where it gave none: with `offload_optimizer` off, a state
        of the one loads in the other.
        """
        for name, param, master in self.weights:
            if f"step.{name}" in tensors:
                moments = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors[f"{key}.{name}"]
                    # Checked here: AdamW would broadcast, and learn from another weight's moments.
                    if value.shape != (() if key == "step" else master.shape):
                        raise ValueError(f"the moments of {name} have another shape")
                    moments[key] = value.to(master.device).float()
                self.adamw.state[master] = moments
            own_master = param.dtype == torch.float32 and f"master.{name}" not in tensors
            if master is not param and not own_master:
                # The model, loaded from the same checkpoint, is this rounded already.
                master.copy_(tensors[f"master.{name}"])


def _master(param: Tensor, offload: bool) -> Tensor:
    """The fp32 copy that is updated; the parameter itself where it can be."""
    offload = offload and param.device.type != "cpu"
    if param.dtype == torch.float32 and not offload:
        return param
    device = "cpu" if offload else param.device
    return param.detach().to(device, torch.float32).requires_grad_()


def _stride(tensor: Tensor) -> int:
    return max(1, tensor.numel() // SAMPLED)


def scheduled_rate(step: int, config: Config) -> float:
    """Learning rate of a step (from 0): linear up to the peak over the warm-up, then linear to
    final_lr_ratio of it.

    The end would be reached one step after the last, so that a decay to nothing wastes no rollout.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + (config.final_lr_ratio - 1) * done)
