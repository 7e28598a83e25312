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
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.images import preprocess

from .phantoms import Case, draw, sample_case

# A number stays its stream's for ever: with another one, all of the stream's images change.
STREAMS = {"train": 1, "validation": 2, "test": 3, "base": 4, "base-check": 5}


MIN_PIXELS = 3136  # 4 image tokens; a phantom has 9, so that none is resized
MAX_PIXELS = 401408  # 512 image tokens
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
    """N images, uint8 [84, 84] -> patches (N * 36, 1176) and grids (N, 3)."""
    coloured = [Image.fromarray(image).convert("RGB") for image in images]
    encoded = [preprocess(image, MIN_PIXELS, MAX_PIXELS) for image in coloured]
    patches, grids = zip(*encoded, strict=True)
    return torch.cat(patches), torch.tensor(grids)
