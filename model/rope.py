"""Multimodal rotary positions (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1).

A token has three positions: temporal, height, width. For text all three are equal and this is
ordinary RoPE. An image token carries its row and column; what follows an image starts after the
largest of them. The head's frequency bands are dealt out to the three streams by `mrope_section`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import Qwen2VLConfig, VisionConfig


def mrope_positions(tokens_L: Tensor, grids_I3: Tensor | None, config: Qwen2VLConfig) -> Tensor:
    """Positions of one unpadded sequence, int64 (3, L): temporal, height and width of each token.

    Args:
        tokens_L: token ids (L,), every image expanded to its h/merge * w/merge image tokens.
        grids_I3: patches of each image as (t, h, w), in reading order; None or empty without
            images.
        config: says which id is `<|image_pad|>`, and how many patches a token spans along an axis.

    Raises:
        ValueError: the runs of image tokens and the grids do not match.
    """
    length = torch.tensor([len(tokens_L)])
    return batch_positions(tokens_L[None], length, grids_I3, config)[:, 0]


def batch_positions(
    tokens_BL: Tensor,
    lengths_B: Tensor,
    grids_I3: Tensor | None,
    config: Qwen2VLConfig,
) -> Tensor:
    """Positions (3, B, L) of a right-padded batch; images are dealt to the rows in reading order;
    padding gets 0. Otherwise as `mrope_positions`.
    """
    positions_3BL = torch.zeros(3, *tokens_BL.shape, dtype=torch.int64)
    grids = iter([] if grids_I3 is None else grids_I3.tolist())
    for row, length in enumerate(lengths_B.tolist()):
        tokens = tokens_BL[row, :length].tolist()
        positions_3BL[:, row, :length] = _positions(tokens, grids, config)
    if next(grids, None):
        raise ValueError("more images were given than the tokens have place for")
    return positions_3BL.to(tokens_BL.device)


def _positions(tokens: list[int], grids: Iterator[list[int]], config: Qwen2VLConfig) -> Tensor:
    """Positions (3, L) of one row, which takes from `grids` as many as it has images."""
    image_token_id = config.image_token_id
    pieces: list[Tensor] = []
    start = 0  # the first token of the next piece
    position = 0  # where its positions begin
    while image_token_id in tokens[start:]:
        image = tokens.index(image_token_id, start)
        text_end = position + image - start
        pieces.append(torch.arange(position, text_end).expand(3, -1))
        t, h, w = next(grids, (0, 0, 0))
        h //= config.vision.spatial_merge_size
        w //= config.vision.spatial_merge_size
        size = t * h * w
        start = image + size
        if not size or tokens[image:start] != [image_token_id] * size:
            raise ValueError(f"the image tokens from {image} on do not match the images' grids")
        coordinates = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
        pieces.append(coordinates.T + text_end)
        position = text_end + max(h, w)
    text_end = position + len(tokens) - start
    pieces.append(torch.arange(position, text_end).expand(3, -1))
    return torch.cat(pieces, dim=1)


def text_rotary(positions_3BL: Tensor, config: Qwen2VLConfig) -> Tensor:
    """cos and sin of the language model's rotation, float32 (2, B, 1, L, head_dim)."""
    frequencies = _frequencies(config.rope_theta, config.head_dim, positions_3BL.device)
    angles = positions_3BL[..., None].float() * frequencies  # (3, B, L, head_dim / 2)
    # So many of the bands turn with each of the three positions.
    temporal, height, width = angles.split(config.mrope_section, dim=-1)
    angles = torch.cat((temporal[0], height[1], width[2]), dim=-1)
    return _cos_and_sin(angles[:, None])


def vision_rotary(grids_I3: Tensor, config: VisionConfig) -> Tensor:
    """cos and sin of the vision tower's 2-D rotation, float32 (2, 1, S, head_dim)."""
    merge = config.spatial_merge_size
    places = []
    for t, h, w in grids_I3.tolist():
        rows_and_columns = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        # Patches come in merge blocks: the merge x merge ones that become a token are neighbours.
        blocks = rows_and_columns.view(h // merge, merge, w // merge, merge, 2)
        frame = blocks.transpose(1, 2).reshape(-1, 2)
        places.append(frame.repeat(t, 1))
    # Half of the frequencies turn with a patch's row and half with its column.
    frequencies = _frequencies(10000.0, config.embed_dim // config.num_heads // 2)
    places_S2 = torch.cat(places).float()
    angles = places_S2[..., None] * frequencies  # (S, 2, head_dim / 4)
    return _cos_and_sin(angles.flatten(1)[None])


def _frequencies(theta: float, size: int, device: torch.device | None = None) -> Tensor:
    """theta^(-2i / size) for i = 0, 1, ..., float32 (size / 2,)."""
    bands = torch.arange(0, size, 2, dtype=torch.float32, device=device)
    return 1.0 / theta ** (bands / size)


def _cos_and_sin(angles: Tensor) -> Tensor:
    """Of angles (..., head_dim / 2), which both halves of a head turn by: (2, ..., head_dim)."""
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., L, head_dim), rotated by the angles (..., L, head_dim)."""
    # Qwen and Llama pair each number of a head's first half with its peer in the second, where the
    # RoPE paper (arXiv 2104.09864) pairs neighbours.
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)  # each pair by a quarter turn
    return x * cos + turned * sin
