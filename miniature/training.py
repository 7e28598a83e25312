"""The loop that all stages of the base share, and the initialisation that lets so small a model
learn at all.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice

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
        if parameter.ndim == 1:  # biases and the scales of norms
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            continue
        std = 0.05 if name == "embed.weight" else parameter.shape[1] ** -0.5
        path = name.split(".")
        if path[-2] in ("out", "down", "proj", "fc2"):
            # Each block adds two such products; their variances add up to that of one.
            std /= math.sqrt(2 * depths[path[0]])
        nn.init.normal_(parameter, 0, std, generator=generator)


def fit(
    name: str,
    module: nn.Module,
    losses: Iterator[Tensor],
    *,
    steps: int,
    rate: float,
) -> None:
    """AdamW on the parameters that need a gradient, with warm-up, then a cosine down to a tenth
    of `rate`; each of `losses` belongs to a new batch.
    """
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in learned if p.ndim == 1], "weight_decay": 0.0},
    ]
    # beta2: with 0.999 the matching circuit takes several times as long to form.
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share_of_rate, steps))
    bar = tqdm(islice(losses, steps), desc=f"{name:>9}", total=steps)
    for loss in bar:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _share_of_rate(steps: int, step: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
