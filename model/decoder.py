"""The language model's block: RMSNorm, attention with rotary positions, SwiGLU.

The query, key and value projections form one matrix, the gate and up projections another: this
makes fewer, larger matrix products. weights.py fuses the checkpoint's separate tensors on loading
and splits them on saving.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .config import Qwen2VLConfig
from .linear import Linear
from .rope import rotate

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (B, H, L, d), k (B, K, L, d), v (B, K, L, d)) -> (B, H, L, d). It decides which tokens
attend to which; see attention.py.
"""


class DecoderLayer(nn.Module):
    """Pre-norm transformer block of the language model; the norm is RMSNorm (arXiv 1910.07467)."""

    def __init__(self, config: Qwen2VLConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.config = config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        width = config.hidden_size
        self.attention_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.qkv = Linear(width, heads * config.head_dim)
        self.out = Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.gate_up = Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, width, bias=False)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (B, L, D), cos and sin (B, 1, L, head_dim) -> (B, L, D)."""
        qkv = self.qkv(self.attention_norm(x_BLD))
        heads = qkv.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)
        H = self.config.num_attention_heads
        K = self.config.num_key_value_heads
        # Only queries and keys have positions: they are rotated in one call.
        q_and_k, v = heads.split((H + K, K), dim=1)
        rotated = rotate(q_and_k, cos, sin)
        q, k = rotated.split((H, K), dim=1)
        attended = attend(self.index, q, k, v)  # (B, H, L, head_dim)
        attended_BLD = attended.transpose(1, 2).flatten(2)
        x_BLD = x_BLD + self.out(attended_BLD)
        gate_up = self.gate_up(self.mlp_norm(x_BLD))
        gate, up = gate_up.chunk(2, dim=-1)
        return x_BLD + self.down(F.silu(gate) * up)
