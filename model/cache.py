"""The keys and values of a rollout: each prompt's once per group, each growing completion's in a
buffer of fixed size.
"""

import torch
from torch import Tensor

from .attention import causal_attention, merged_attention, two_part_attention


class GroupCache:
    """Prompt KV (N, K, P, d) and completion KV (R, K, T, d) of every layer; R = N * A rows, A of
    each prompt's group.

    It serves as a decoder layer's `attend` twice: `prefill` runs the prompts and keeps their keys
    and values; `decode` adds one token per row at slot `step` and attends to both parts. `keep`
    lets rows go: those that stay are copied to the buffers' beginning. `begin` makes all ready for
    other prompts. No buffer is ever replaced, so that a CUDA graph that was captured once may be
    replayed on them for good.
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
        self.groups, self.group_size, self.max_new_tokens = groups, group_size, max_new_tokens
        self.prompt_bias = torch.zeros(
            groups, 1, 1, prompt_size, dtype=dtype, device=device
        )  # 0, or -inf on padding
        self.prompt: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        """The slot of the next token, on the device: a captured graph reads it anew at every
        replay.
        """
        self.places = torch.arange(max_new_tokens, device=device)

    def begin(self, lengths_N: Tensor) -> None:
        """Forget all rows; the next to come are prompts of these lengths."""
        self.groups = len(lengths_N)
        places = torch.arange(self.prompt_bias.shape[-1], device=lengths_N.device)
        self.prompt_bias.zero_().masked_fill_(
            (places >= lengths_N[:, None])[:, None, None], float("-inf")
        )
        self.step.zero_()

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, P, d), k and v (N, K, P, d), P at most the buffers' size -> (N, H, P, d)."""
        N, K, P, d = k.shape
        if layer == len(self.prompt):
            # Zeros, because a slot not written yet is multiplied by a weight of 0, and 0 times
            # garbage may be NaN.
            size, rows = self.prompt_bias.shape[-1], N * self.group_size
            self.prompt.append(tuple(k.new_zeros(N, K, size, d) for _ in "kv"))
            self.own.append(tuple(k.new_zeros(rows, K, self.max_new_tokens, d) for _ in "kv"))
        for buffer, new in zip(self.prompt[layer], (k, v)):
            buffer[:, :, :P] = new
        return causal_attention(q, k, v)

    def decode(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, span: int, own_seen: Tensor | None
    ) -> Tensor:
        """One token per row: q (R, H, 1, d), k and v (R, K, 1, d) -> (R, H, 1, d).

        Attention looks at the first `span` slots of a row, at all of them or at those that are True
        in `own_seen`.
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
            out = two_part_attention(q, *prompt, *own, self.prompt_bias[:N, 0, 0] == 0, own_seen)
        return out.reshape(R, H, 1, d)

    def keep(self, groups: Tensor, rows: Tensor, written: int) -> None:
        """Go on with these of the present groups (n,) and rows (n * A,) alone, groups in order, as
        many rows of each.

        `written` slots of each row hold something.
        """
        for layer in range(len(self.own)):
            for buffer in self.own[layer]:
                buffer[: len(rows), :, :written] = buffer[rows, :, :written]
            if len(groups) < self.groups:
                for buffer in self.prompt[layer]:
                    buffer[: len(groups)] = buffer[groups]
        self.prompt_bias[: len(groups)] = self.prompt_bias[groups]
        self.groups = len(groups)
