"""The keys and values of a rollout: each prompt's once per group, each growing completion's in a buffer of fixed size."""

import torch
from torch import Tensor

from .attention import causal_attention, merged_attention, two_part_attention


class GroupCache:
    """Prompt KV (N, K, P, d) and completion KV (R, K, T, d) of every layer; R = N * A rows, A of each prompt's group.

    It serves as a decoder layer's `attend` twice: `prefill` runs the prompts and keeps their keys and values; `decode`
    adds one token per row at slot `step` and attends to both parts. `keep` lets rows go. The buffers never move: the
    rows that stay are moved to their beginning, so that a CUDA graph may be replayed on them.
    """

    def __init__(self, prompt_lengths_N: Tensor, prompt_size: int, group_size: int, max_new_tokens: int) -> None:
        device = prompt_lengths_N.device
        self.groups, self.group_size, self.max_new_tokens = len(prompt_lengths_N), group_size, max_new_tokens
        self.prompt_seen = torch.arange(prompt_size, device=device) < prompt_lengths_N[:, None]
        self.prompt: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        """The slot of the next token, on the device: a captured graph reads it anew at every replay."""
        self.places = torch.arange(max_new_tokens, device=device)

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, P, d), k and v (N, K, P, d) -> (N, H, P, d)."""
        N, K, _, d = k.shape
        if layer == 0:
            bias = torch.zeros(self.prompt_seen.shape, dtype=q.dtype, device=q.device)
            self.prompt_bias = bias.masked_fill_(~self.prompt_seen, float("-inf"))[:, None, None]
        # Views of the fused projection would keep all of it alive, and every decoding step would copy them into order.
        self.prompt.append((k.contiguous(), v.contiguous()))
        # Zeros, because a slot not written yet is multiplied by a weight of 0, and 0 times garbage may be NaN.
        self.own.append(tuple(k.new_zeros(N * self.group_size, K, self.max_new_tokens, d) for _ in "kv"))
        return causal_attention(q, k, v)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, span: int, own_seen: Tensor | None) -> Tensor:
        """One token per row: q (R, H, 1, d), k and v (R, K, 1, d) -> (R, H, 1, d).

        Attention looks at the first `span` slots of a row, at all of them or at those that are True in `own_seen`.
        """
        (R, H, _, d), N = q.shape, self.groups
        for buffer, new in zip(self.own[layer], (k, v)):
            buffer[:R].index_copy_(2, self.step, new)
        own = [buffer[:R, :, :span] for buffer in self.own[layer]]
        prompt = [buffer[:N] for buffer in self.prompt[layer]]
        q = q.reshape(N, R // N, H, 1, d)
        if own_seen is None and q.device.type == "cpu":
            out = merged_attention(q, *prompt, *own, self.prompt_bias[:N])
        else:
            own = [x.unflatten(0, (N, R // N)) for x in own]
            out = two_part_attention(q, *prompt, *own, self.prompt_seen[:N], own_seen)
        return out.reshape(R, H, 1, d)

    def keep(self, groups: Tensor, rows: Tensor, written: int) -> None:
        """Go on with these of the present groups (n,) and rows (n * A,) alone, groups in order, as many rows of each.

        `written` slots of each row hold something.
        """
        for layer in range(len(self.own)):
            for buffer in self.own[layer]:
                buffer[: len(rows), :, :written] = buffer[rows, :, :written]
            if len(groups) < self.groups:
                for buffer in self.prompt[layer]:
                    buffer[: len(groups)] = buffer[groups]
        for buffer in (self.prompt_seen, self.prompt_bias):
            buffer[: len(groups)] = buffer[groups]
        self.groups = len(groups)
