"""A pool of phantoms held in memory: grey images, what each shows, and the patches that the model
takes.

Every image has its own generator, made of (seed, stream, index), so that a pool does not depend on
how many processes drew it, and so that streams never share an image.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .phantoms import SIZE, Case, draw, sample_case

STREAMS = {"train": 1, "validation": 2, "test": 3, "base": 4, "base-check": 5}
PATCH, MERGE = 14, 2
_MEAN = torch.tensor(
    [0.48145466, 0.4578275, 0.40821073]
)  # of CLIP, as in the published preprocessor_config.json
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
_CHUNK = 250


@dataclass(frozen=True)
class Pool:
    """`images_NHW` uint8 and the case of each."""

    images_NHW: np.ndarray
    cases: list[Case]

    def __len__(self) -> int:
        return len(self.cases)

    def images(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(self.images_NHW[indices])


def draw_one(
    seed: int, stream: str, index: int, modality: str | None = None
) -> tuple[np.ndarray, Case]:
    """Image number `index` of a stream: its pixels and its case."""
    rng = np.random.default_rng([seed, STREAMS[stream], index])
    case = sample_case(rng, modality)
    return draw(case, rng), case


def draw_pool(
    seed: int, stream: str, size: int, processes: int = 2, modality: str | None = None
) -> Pool:
    """Draw the first `size` images of a stream (about 3 ms each and process)."""
    jobs = [
        (seed, stream, range(start, min(start + _CHUNK, size)), modality)
        for start in range(0, size, _CHUNK)
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as executor:
        bar = tqdm(
            executor.map(_draw_chunk, jobs),
            total=len(jobs),
            desc=f"drawing {size} phantoms",
            unit_scale=_CHUNK,
        )
        drawn = [one for chunk in bar for one in chunk]
    return Pool(np.stack([image for image, _ in drawn]), [case for _, case in drawn])


def grey_patches(images_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, 84, 84] -> patches (N * 36, 1176) and grids (N, 3), as the Hugging Face image
    processor lays them out.

    Patches go 2x2 block by 2x2 block; within a patch channel, frame, row, column. A still image
    fills both frames.
    """
    count, side = len(images_NHW), SIZE // PATCH // MERGE
    blocks = images_NHW.float().view(count, side, MERGE, PATCH, side, MERGE, PATCH) / 255
    grey = blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 1, 1, PATCH * PATCH)
    patches = (grey - _MEAN[:, None, None]) / _STD[:, None, None]
    grids = torch.tensor([[1, SIZE // PATCH, SIZE // PATCH]]).expand(count, 3)
    return patches.expand(-1, 3, 2, -1).reshape(len(grey), -1), grids


def _draw_chunk(job: tuple[int, str, range, str | None]) -> list[tuple[np.ndarray, Case]]:
    seed, stream, indices, modality = job
    return [draw_one(seed, stream, index, modality) for index in indices]
