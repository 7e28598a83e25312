"""Phantoms by number: grey images, what each shows, and the patches that the model takes.

Every image has its own generator, made of (seed, stream, index), so that a pool does not depend on
how many processes drew it, and so that streams never share an image.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.images import MEAN, STD

from .phantoms import Case, draw, sample_case

# A number stays its stream's for ever: with another one, all of the stream's images change.
STREAMS = {"train": 1, "validation": 2, "test": 3, "base": 4, "base-check": 5}


# uint8 [84, 84] and what it shows. Images are numpy's, since they are sent to other processes: a
# tensor would travel through shared memory, of which containers have little.
Phantom = tuple[np.ndarray, Case]
Pool = list[Phantom]


def draw_one(seed: int, stream: str, index: int, modality: str | None = None) -> Phantom:
    """Image number `index` of a stream: its pixels and its case."""
    rng = np.random.default_rng([seed, STREAMS[stream], index])
    case = sample_case(rng, modality)
    return draw(case, rng), case


def draw_pool(seed: int, stream: str, size: int) -> Pool:
    """Draw the first `size` images of a stream in two processes (about 3 ms each and process)."""
    draw_index = partial(draw_one, seed, stream)
    # Forked, because a spawned child would import torch, which takes longer than 1000 images.
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as executor:
        drawn = executor.map(draw_index, range(size), chunksize=250)
        return list(tqdm(drawn, total=size, desc=f"drawing {size} phantoms"))


def grey_patches(images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """N images, uint8 [84, 84] -> patches (N * 36, 1176) and grids (N, 3).

    The numbers of `data.images.preprocess`, but of all images at once, since none is resized.
    """
    pixels = torch.from_numpy(np.stack(images)) / 255
    # 3 blocks of 2 patches of 14 pixels, downwards and across -> blocks, patches, pixels
    patches = pixels.view(-1, 3, 2, 14, 3, 2, 14).permute(0, 1, 4, 2, 5, 3, 6)
    mean, std = torch.tensor((MEAN, STD)).view(2, 3, 1, 1)
    channels = (patches.reshape(-1, 1, 1, 14 * 14) - mean) / std
    frames = channels.expand(-1, 3, 2, -1)
    return frames.flatten(1), torch.tensor([(1, 6, 6)] * len(images))
