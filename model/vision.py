"""The vision tower: from patches to one language-model token per 2x2 patches (arXiv 2409.12191,
section 2.1).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import Qwen2VLConfig, VisionConfig
from .linear import Linear
from .rope import rotate, vision_rotary

_NORM_EPS = 1e-6


def run_block(recompute: bool, block: nn.Module, *inputs: Any) -> Tensor:
    """Run a block; with `recompute`, run it again in the backward pass instead of keeping its
    activations (activation checkpointing, Chen et al. 2016, arXiv 1604.06174).
    """
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs)
    # A block draws no random numbers, so there is no generator state to save.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


class VisionBlock(nn.Module):
    """Pre-norm transformer block: full attention within each image, then an MLP with quick-GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.fc1 = Linear(width, config.mlp_ratio * width)
        self.fc2 = Linear(config.mlp_ratio * width, width)

    def forward(self, x_SE: Tensor, cos: Tensor, sin: Tensor, sizes: list[int]) -> Tensor:
        """x (S, E), the patches of all images; `sizes` is the number of patches in each."""
        qkv = self.qkv(self.norm1(x_SE))
        heads = qkv.unflatten(1, (3, self.num_heads, -1))
        q_and_k, v = heads.permute(1, 2, 0, 3).split((2, 1))  # (2, heads, S, d) and (1, ...)
        # In fp32, as in the published model's training: bf16 would round cos and sin.
        q, k = rotate(q_and_k.float(), cos, sin).to(v.dtype)
        attended = _attend_within_images(q, k, v[0], sizes)
        attended_SE = attended.transpose(0, 1).flatten(1)
        x_SE = x_SE + self.proj(attended_SE)
        hidden = self.fc1(self.norm2(x_SE))
        quick_gelu = hidden * torch.sigmoid(1.702 * hidden)
        return x_SE + self.fc2(quick_gelu)


def _attend_within_images(q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> Tensor:
    """(heads, S, d) -> (heads, S, d): one batch if all images have the same size, else a loop."""
    if len(set(sizes)) == 1:
        shape = len(sizes), sizes[0]
        q, k, v = (x.unflatten(1, shape).transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(0, 1).flatten(1, 2)
    outputs = []
    images = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
    for q_image, k_image, v_image in images:
        out = F.scaled_dot_product_attention(q_image[None], k_image[None], v_image[None])
        outputs.append(out[0])
    return torch.cat(outputs, dim=1)


class VisionTower(nn.Module):
    """ViT and merger. The patch embedding is a single matrix product: a convolution whose stride
    equals its kernel size is nothing else.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = vision = config.vision
        merged = vision.embed_dim * vision.spatial_merge_size**2
        self.patch_embed = Linear(vision.patch_values, vision.embed_dim, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(vision) for _ in range(vision.depth))
        self.merger_norm = nn.LayerNorm(vision.embed_dim, eps=_NORM_EPS)
        self.merger_fc1 = Linear(merged, merged)
        self.merger_fc2 = Linear(merged, config.hidden_size)

    def forward(self, patches_SC: Tensor, grids_I3: Tensor, recompute: bool = False) -> Tensor:
        """Patches of all images in reading order (S, C), grids (I, 3) -> (S / merge^2, hidden)."""
        x_SE = self.patch_embed(patches_SC.to(self.patch_embed.weight.dtype))
        cos, sin = vision_rotary(grids_I3, self.config).to(x_SE.device)
        # Frames of a video attend only within themselves: they count as t images of h * w patches.
        frames, heights, widths = grids_I3.unbind(dim=1)
        sizes = (heights * widths).repeat_interleave(frames).tolist()
        for block in self.blocks:
            x_SE = run_block(recompute, block, x_SE, cos, sin, sizes)
        # The merge^2 patches of a token are adjacent, so merging them is a view.
        merged = self.merger_norm(x_SE).view(-1, self.merger_fc1.in_features)
        return self.merger_fc2(F.gelu(self.merger_fc1(merged)))
