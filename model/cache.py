"""The KV cache of a rollout: prompts once per group, completions in buffers of fixed size."""

import torch
from torch import Tensor

from .attention import causal_attention, merged_attention, two_part_attention


class GroupCache:
    """Prompt KV (N, K, P, d) and completion KV (R, K, T, d) of every layer.

    There are R = N * A rows, A for each prompt's group. Two methods serve as a decoder layer's
    `attend`: `prefill` runs the prompts and keeps their keys and values; `decode` adds one token
    per row at slot `step` and attends to prompt and completion. `keep` drops rows, copying those
    that stay to the start of the buffers. `begin` resets the cache for other prompts. No buffer is
    ever replaced, so a captured CUDA graph can always be replayed.
    """

    def __init__(
        self,
        groups: int,
        prompt_size: int,
        group_size: int,
        max_new_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.groups = groups
        self.group_size = group_size
        # Added to the scores: 0, or -inf on padding.
        self.prompt_bias = torch.zeros(groups, 1, 1, prompt_size, dtype=dtype, device=device)
        self.prompt: list[Tensor] = []  # keys and values of each layer, (2, N, K, P, d)
        self.own: list[Tensor] = []  # (2, N * G, K, T, d)
        # The slot of the next token. It is on the device because captured graphs read it there.
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.slots = torch.arange(max_new_tokens, device=device)

    def begin(self, lengths_N: Tensor) -> None:
        """Drop all rows and prepare for prompts of these lengths."""
        self.groups = len(lengths_N)
        size = self.prompt_bias.shape[-1]
        places = torch.arange(size, device=lengths_N.device)
        padding = places >= lengths_N[:, None, None, None]
        self.prompt_bias.zero_().masked_fill_(padding, float("-inf"))
        self.step.zero_()

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, P, d), k and v (N, K, P, d), P at most the buffers' size -> (N, H, P, d)."""
        N, K, P, d = k.shape
        if layer == len(self.prompt):  # the first prefill allocates
            # Zeros, because unwritten slots are multiplied by a weight of 0, and 0 times garbage
            # may be NaN.
            size = self.prompt_bias.shape[-1]
            rows = N * self.group_size
            self.prompt.append(k.new_zeros(2, N, K, size, d))
            self.own.append(k.new_zeros(2, rows, K, len(self.slots), d))
        prompt_k, prompt_v = self.prompt[layer]
        prompt_k[:, :, :P] = k
        prompt_v[:, :, :P] = v
        return causal_attention(q, k, v)

    def decode(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        span: int,
        own_mask: Tensor | None,
    ) -> Tensor:
        """One token per row: q (R, H, 1, d), k and v (R, K, 1, d) -> (R, H, 1, d).

        Attention reads the first `span` slots of a row: all of them, or those where `own_mask`
        (span,) is True.
        """
        own = self.own[layer][:, : len(q)]
        own.index_copy_(3, self.step, torch.stack((k, v)))
        own_k, own_v = own[:, :, :, :span]
        prompt_k, prompt_v = self.prompt[layer][:, : self.groups]
        bias = self.prompt_bias[: self.groups]
        # (N, R / N, K, H / K, d): grouped by prompt and by KV head.
        grouped_q = q.view(self.groups, -1, k.shape[1], q.shape[1] // k.shape[1], q.shape[3])
        if own_mask is None and q.device.type == "cpu":
            out = merged_attention(grouped_q, prompt_k, prompt_v, own_k, own_v, bias)
        else:
            out = two_part_attention(grouped_q, prompt_k, prompt_v, own_k, own_v, bias, own_mask)
        return out.reshape(q.shape)

    def keep(self, groups: Tensor, rows: Tensor, written: int) -> None:
        """Keep only these groups (n,) and rows (n * A,), in order, A rows for each group.

        `written` slots of each row are filled.
        """
        for own in self.own:
            own[:, : len(rows), :, :written] = own[:, rows, :, :written]
        if len(groups) < self.groups:
            for buffer in (*self.prompt, self.prompt_bias[None]):
                buffer[:, : len(groups)] = buffer[:, groups]
        self.groups = len(groups)
