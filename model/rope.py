"""Multimodal rotary positions (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1).

A token has three positions: temporal, height and width. For text all three are equal, which is
ordinary RoPE. An image token has the position of its row and column, and the text after an image
starts after the largest of these. `mrope_section` divides the head's frequency bands among the
three positions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import Qwen2VLConfig, VisionConfig


def mrope_positions(tokens_L: Tensor, grids_I3: Tensor | None, config: Qwen2VLConfig) -> Tensor:
    """Positions of one unpadded sequence, int64 (3, L): temporal, height and width of each token.

    Args:
        tokens_L: token ids (L,), every image expanded to its h/merge * w/merge image tokens.
        grids_I3: grid of patches of each image, (t, h, w), in reading order; None or empty if there
            are no images.
        config: for the id of `<|image_pad|>` and the number of patches per token along an axis.

    Raises:
        ValueError: the image tokens do not match the grids.
    """
    length = torch.tensor([len(tokens_L)])
    return batch_positions(tokens_L[None], length, grids_I3, config)[:, 0]


def batch_positions(
    tokens_BL: Tensor,
    lengths_B: Tensor,
    grids_I3: Tensor | None,
    config: Qwen2VLConfig,
) -> Tensor:
    """`mrope_positions` of a right-padded batch, (3, B, L), 0 on padding.

    The images belong to the rows in reading order.
    """
    positions_3BL = torch.zeros(3, *tokens_BL.shape, dtype=torch.int64)
    grids = iter([] if grids_I3 is None else grids_I3.tolist())
    for row, length in enumerate(lengths_B.tolist()):
        tokens = tokens_BL[row, :length].tolist()
        positions_3BL[:, row, :length] = _positions(tokens, grids, config)
    if next(grids, None):
        raise ValueError("there are more images than the image tokens have room for")
    return positions_3BL.to(tokens_BL.device)


def _positions(tokens: list[int], grids: Iterator[list[int]], config: Qwen2VLConfig) -> Tensor:
    """Positions (3, L) of one row; takes one grid from `grids` for each of its images."""
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
    """cos and sin of the rotation in the language model, float32 (2, B, 1, L, head_dim)."""
    frequencies = _frequencies(config.rope_theta, config.head_dim, positions_3BL.device)
    angles = positions_3BL[..., None].float() * frequencies  # (3, B, L, head_dim / 2)
    # `mrope_section` is the number of bands that rotate with each of the three positions.
    temporal, height, width = angles.split(config.mrope_section, dim=-1)
    angles = torch.cat((temporal[0], height[1], width[2]), dim=-1)
    return _cos_and_sin(angles[:, None])


def vision_rotary(grids_I3: Tensor, config: VisionConfig) -> Tensor:
    """cos and sin of the 2-D rotation in the vision tower, float32 (2, 1, S, head_dim)."""
    merge = config.spatial_merge_size
    places = []
    for t, h, w in grids_I3.tolist():
        rows_and_columns = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        # Patches are ordered by block: the merge x merge patches of a token are adjacent.
        blocks = rows_and_columns.view(h // merge, merge, w // merge, merge, 2)
        frame = blocks.transpose(1, 2).reshape(-1, 2)
        places.append(frame.repeat(t, 1))
    # Half of the bands rotate with a patch's row, half with its column.
    frequencies = _frequencies(10000.0, config.embed_dim // config.num_heads // 2)
    places_S2 = torch.cat(places).float()
    angles = places_S2[..., None] * frequencies  # (S, 2, head_dim / 4)
    return _cos_and_sin(angles.flatten(1)[None])


def _frequencies(theta: float, size: int, device: torch.device | None = None) -> Tensor:
    """theta^(-2i / size) for i = 0, 1, ..., float32 (size / 2,)."""
    bands = torch.arange(0, size, 2, dtype=torch.float32, device=device)
    return 1.0 / theta ** (bands / size)


def _cos_and_sin(angles: Tensor) -> Tensor:
    """Angles (..., head_dim / 2) -> (2, ..., head_dim): both halves of a head share the angles."""
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., L, head_dim) by the angles with these cos and sin (..., L, head_dim)."""
    # Qwen and Llama pair each value in a head's first half with its counterpart in the second half;
    # the RoPE paper (arXiv 2104.09864) pairs neighbours.
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)  # each pair, rotated by 90 degrees
    return x * cos + quarter_turn * sin
