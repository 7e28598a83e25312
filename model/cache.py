"""The keys and values of a rollout: each prompt's once per group, each completion's in a buffer of fixed size."""

import torch
from torch import Tensor

from .attention import causal_attention, two_part_attention


class GroupCache:
    """Prompt KV (N, K, P, d) and completion KV (N, G, K, T, d) of every layer.

    It serves as a decoder layer's `attend` twice: `prefill` runs the prompts and keeps their keys and values; `decode`
    adds one token per completion at slot `step` and attends to both parts. The buffers never move or grow.
    """

    def __init__(self, prompt_lengths_N: Tensor, prompt_size: int, group_size: int, max_new_tokens: int) -> None:
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.seen = torch.arange(prompt_size, device=prompt_lengths_N.device) < prompt_lengths_N[:, None]
        self.prompt: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        self.step = 0

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, P, d), k and v (N, K, P, d) -> (N, H, P, d)."""
        N, K, _, d = k.shape
        # Views of the fused projection would keep all of it alive, and every decoding step would copy them into order.
        self.prompt.append((k.contiguous(), v.contiguous()))
        self.own.append(tuple(k.new_empty(N, self.group_size, K, self.max_new_tokens, d) for _ in "kv"))
        return causal_attention(q, k, v)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token per completion: q (N * G, H, 1, d), k and v (N * G, K, 1, d) -> (N * G, H, 1, d)."""
        own_k, own_v = self.own[layer]
        N, G, K, _, d = own_k.shape
        own_k[:, :, :, self.step] = k.view(N, G, K, d)
        own_v[:, :, :, self.step] = v.view(N, G, K, d)
        past = slice(0, self.step + 1)
        q = q.view(N, G, -1, 1, d)
        out = two_part_attention(q, *self.prompt[layer], own_k[:, :, :, past], own_v[:, :, :, past], self.seen, None)
        return out.reshape(N * G, -1, 1, d)
