"""The language model's block: RMSNorm, attention with rotary positions, SwiGLU.

Query, key and value projections are one matrix, gate and up projections another: fewer, larger
matrix products. The checkpoint's separate tensors are fused on loading and split on saving
(weights.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Qwen2VLConfig
from .linear import Linear
from .rope import rotate

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (B, H, L, d), k (B, K, L, d), v (B, K, L, d)) -> (B, H, L, d): who sees whom, see
attention.py.
"""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen2VLConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv = Linear(
            config.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        )
        self.out = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        B, L, _ = x_BLD.shape
        heads = self.qkv(self.attention_norm(x_BLD)).view(B, L, -1, self.head_dim).transpose(1, 2)
        turned, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = rotate(turned, cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        x_BLD = x_BLD + self.out(attend(self.index, q, k, v).transpose(1, 2).reshape(B, L, -1))
        gate, up = self.gate_up(self.mlp_norm(x_BLD)).chunk(2, dim=-1)
        return x_BLD + self.down(F.silu(gate) * up)
