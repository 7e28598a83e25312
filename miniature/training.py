"""The loop that all stages of the base share, and the initialisation that lets so small a model
learn at all.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import Qwen2VL

WARM_UP = 100


def initialise(model: Qwen2VL, seed: int) -> None:
    """N(0, 1 / fan-in) for matrices, smaller where a block writes into the residual stream;
    embeddings N(0, 0.05^2).

    With the usual standard deviation of 0.02 a model of width 128 sits on a plateau for thousands
    of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    depths = {"layers": len(model.layers), "visual": len(model.visual.blocks)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
            continue
        std = 0.05 if name == "embed.weight" else parameter.shape[1] ** -0.5
        if name.split(".")[-2] in ("out", "down", "proj", "fc2"):
            std /= math.sqrt(2 * depths[name.split(".")[0]])
        nn.init.normal_(parameter, 0, std, generator=generator)


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    rate: float,
) -> None:
    """AdamW with warm-up, then a cosine down to a tenth of `rate`; the bar shows a running mean of
    the loss.

    beta2 is 0.95: with 0.999 the matching circuit takes several times as long to form.
    """
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _share_of_rate(step, steps)
    )
    mean = None
    bar = tqdm(range(steps), desc=f"{name:>9}", dynamic_ncols=True)
    for step in bar:
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)


def _share_of_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
