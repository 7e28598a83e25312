"""Multimodal rotary positions (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1).

A token has three positions: temporal, height, width. For text all three are equal and this is
ordinary RoPE. An image token carries its row and column; what follows an image starts after the
largest of them. The head's frequency bands are dealt out to the three streams by `mrope_section`.
"""

import torch
from torch import Tensor


def mrope_positions(
    tokens_L: Tensor, grids_I3: Tensor | None, image_token_id: int, merge_size: int = 2
) -> Tensor:
    """Positions of one unpadded sequence.

    Args:
        tokens_L: token ids (L,), every image expanded to its h/merge * w/merge image tokens.
        grids_I3: patches of each image as (t, h, w), in reading order; None or empty without
            images.
        image_token_id: id of `<|image_pad|>`.
        merge_size: patches that one token spans along an axis.

    Returns:
        int64 (3, L) on the CPU: temporal, height and width position of each token.

    Raises:
        ValueError: the runs of image tokens and the grids do not match.
    """
    tokens = tokens_L.tolist()
    grids = [] if grids_I3 is None else grids_I3.tolist()
    pieces, at, position = [], 0, 0
    for t, h, w in grids:
        h, w = h // merge_size, w // merge_size
        start = _next_image(tokens, at, image_token_id)
        if tokens[start : start + t * h * w] != [image_token_id] * (t * h * w) or not t * h * w:
            raise ValueError(
                f"image {len(pieces) // 2} needs {t * h * w} image tokens in a row at {start}"
            )
        pieces.append(torch.arange(position, position + start - at).expand(3, -1))
        position += start - at
        ranges = [torch.arange(size) + position for size in (t, h, w)]
        pieces.append(torch.stack(torch.meshgrid(*ranges, indexing="ij")).reshape(3, -1))
        position += max(h, w)
        at = start + t * h * w
    if image_token_id in tokens[at:]:
        raise ValueError("there are more image tokens than the images' grids account for")
    pieces.append(torch.arange(position, position + len(tokens) - at).expand(3, -1))
    return torch.cat(pieces, dim=1)


def _next_image(tokens: list[int], at: int, image_token_id: int) -> int:
    try:
        return tokens.index(image_token_id, at)
    except ValueError:
        raise ValueError("there are fewer runs of image tokens than images") from None


def batch_positions(
    tokens_BL: Tensor,
    lengths_B: Tensor,
    grids_I3: Tensor | None,
    image_token_id: int,
    merge_size: int = 2,
) -> Tensor:
    """Positions (3, B, L) of a right-padded batch; images are dealt to the rows in reading order;
    padding gets 0.
    """
    positions = torch.zeros(3, *tokens_BL.shape, dtype=torch.int64)
    grids = torch.zeros(0, 3, dtype=torch.int64) if grids_I3 is None else grids_I3.cpu()
    used = 0
    for row, length in enumerate(lengths_B.tolist()):
        tokens = tokens_BL[row, :length].cpu()
        needed, count = int((tokens == image_token_id).sum()), 0
        while needed > 0 and used + count < len(grids):
            needed -= int(grids[used + count].prod()) // merge_size**2
            count += 1
        positions[:, row, :length] = mrope_positions(
            tokens, grids[used : used + count], image_token_id, merge_size
        )
        used += count
    if used != len(grids):
        raise ValueError(f"{len(grids)} images were given, but the tokens have place for {used}")
    return positions.to(tokens_BL.device)


def text_rotary(
    positions_3BL: Tensor, head_dim: int, theta: float, section: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 (B, 1, L, head_dim), of the language model's rotation."""
    bands = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_3BL.device)
    angles = positions_3BL[..., None].float() * (
        1.0 / theta ** (bands / head_dim)
    )  # (3, B, L, head_dim / 2)
    angles = torch.cat([part[i] for i, part in enumerate(angles.split(section, dim=-1))], dim=-1)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def vision_rotary(grids_I3: Tensor, head_dim: int, merge_size: int = 2) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 (1, S, head_dim), of the vision tower's 2-D rotation.

    Half of the frequencies turn with a patch's row and half with its column. Patches lie in merge
    blocks: the merge x merge patches that become one token are neighbours.
    """
    rows, columns = [], []
    for t, h, w in grids_I3.tolist():
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        for axis, out in ((row, rows), (column, columns)):
            blocks = axis.reshape(h // merge_size, merge_size, w // merge_size, merge_size)
            out.append(blocks.transpose(1, 2).reshape(-1).repeat(t))
    bands = torch.arange(0, head_dim // 2, 2, dtype=torch.float32)
    frequencies = 1.0 / 10000.0 ** (bands / (head_dim // 2))
    angles = torch.cat(
        [torch.cat(axis)[:, None].float() * frequencies for axis in (rows, columns)], dim=-1
    )
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(0).to(grids_I3.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (..., L, head_dim) by the angles (..., L, head_dim), in the "two halves" layout of
    Qwen and Llama.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
