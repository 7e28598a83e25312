"""AdamW on fp32 master weights, with warm-up and gradient clipping.

At a learning rate of 1e-6 an update is far smaller than the distance between neighbouring bf16 numbers (0.4 to 0.8 %
of a weight): added to bf16 weights it would be rounded away. So the optimiser owns fp32 copies, adds to those, and
rounds them into the model. Where the model itself is fp32, its parameters are the masters and nothing is copied.
"""

import torch
from torch import Tensor, nn

from .config import Config


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for a model of any floating-point type.

    Call `accumulate` after each micro-batch's backward, `step` once per update.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.names, self.params = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.params]
        self.max_grad_norm = config.max_grad_norm
        betas = (config.adam_beta1, config.adam_beta2)
        self.adamw = torch.optim.AdamW(self.masters, betas=betas, weight_decay=config.weight_decay, fused=True)

    def accumulate(self) -> None:
        """Add the model's fresh gradients to the masters', in fp32: a long sum in bf16 would lose bits."""
        for param, master in zip(self.params, self.masters):
            if master is not param and param.grad is not None:
                master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
                param.grad = None

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, round into the model, forget the gradients. Returns the gradient's norm before clipping.

        A gradient that is not finite changes nothing: the update is left out and the returned norm says so.
        """
        norm = nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        if torch.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
            with torch.no_grad():
                for param, master in zip(self.params, self.masters):
                    if master is not param:
                        param.copy_(master)
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by parameter name: both moments, the step count, the masters if separate."""
        tensors = {}
        for name, param, master in zip(self.names, self.params, self.masters):
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value.detach()
            if master is not param:
                tensors[f"master.{name}"] = master.detach()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave. KeyError if anything is missing."""
        for name, param, master in zip(self.names, self.params, self.masters):
            if any(f"{key}.{name}" in tensors for key in _MOMENTS):
                self.adamw.state[master] = {key: tensors[f"{key}.{name}"].to(master.device) for key in _MOMENTS}
            if master is not param:
                with torch.no_grad():
                    master.copy_(tensors[f"master.{name}"])
                    param.copy_(master)


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def scheduled_rate(step: int, config: Config) -> float:
    """Learning rate of a step (from 0): linear up to the peak over the warm-up, then linear to final_lr_ratio of it.

    The end would be reached one step after the last, so that a decay to nothing wastes no rollout.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + (config.final_lr_ratio - 1) * done)
