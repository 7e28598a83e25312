"""Attention for G completions that share one prompt.

A decoder layer computes queries, keys and values and passes them to an `attend` function. Which
tokens attend to which is decided here and nowhere else. Each fast form has a slow twin that tests
compare it with.

Letters: N prompts of P tokens, G completions of T tokens each, S keys of a completion; H query
heads and K key-value heads of size d. Each KV head serves H / K consecutive query heads
(grouped-query attention, arXiv 2305.13245).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# cuDNN's kernel, which torch tries first on Hopper GPUs, is off for the whole process. Its backward
# pass can return NaN with a mask (pytorch/pytorch#196678, huggingface/trl#7181), and it builds a
# plan for every new shape, that is, for almost every micro-batch of packed completions. The flash
# and memory-efficient kernels stay on.
torch.backends.cuda.enable_cudnn_sdp(False)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every token to itself and the tokens before it.

    Args:
        q: (B, H, L, d).
        k, v: (B, K, L, d).

    Returns:
        (B, H, L, d).
    """
    # Right padding needs no mask: it comes after all real tokens, so none of them attends to it.
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def two_part_attention(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    prompt_bias: Tensor,
    own_mask: Tensor | None = None,
) -> Tensor:
    """Attention of one query per completion to the group's prompt and the completion's own tokens.

    The prompt is not copied: the scores are two matrix products, that with the prompt over all G
    completions at once ("bifurcated attention", arXiv 2403.08845). One softmax runs over both.

    Args:
        q: queries (N, G, K, H / K, d).
        prompt_k, prompt_v: (N, K, P, d), stored once per group.
        own_k, own_v: (N * G, K, S, d), the completion's own keys and values.
        prompt_bias: (N, 1, 1, P), 0 or, on padding, -inf.
        own_mask: bool (S,), True on the own keys to attend to; None for all.

    Returns:
        (N, G, K, H / K, d).
    """
    G = q.shape[1]
    P, d = prompt_k.shape[2:]
    own_scores = _wide_product(q, own_k.unflatten(0, (-1, G)).mT)  # (N, G, K, H / K, S)
    if own_mask is not None:
        own_scores = own_scores.masked_fill(~own_mask, float("-inf"))
    prompt_scores = _wide_product(_by_prompt(q), prompt_k.mT) + prompt_bias
    scores = torch.cat((_by_completion(prompt_scores, G), own_scores), dim=-1)
    weights = (scores * d**-0.5).softmax(dim=-1).to(q.dtype)
    prompt_weights, own_weights = weights.tensor_split([P], dim=-1)
    from_prompt = _by_prompt(prompt_weights) @ prompt_v
    from_own = own_weights @ own_v.unflatten(0, (-1, G))
    return _by_completion(from_prompt, G) + from_own


def _by_prompt(x: Tensor) -> Tensor:
    """(N, G, K, R, ...) -> (N, K, G * R, ...): all rows of a group, for a single product."""
    return x.transpose(1, 2).flatten(2, 3)


def _by_completion(x: Tensor, G: int) -> Tensor:
    """(N, K, G * R, ...) -> (N, G, K, R, ...)."""
    return x.unflatten(2, (G, -1)).transpose(1, 2)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product for scores, in fp32 even for bf16 inputs."""
    # Near 30, neighbouring bf16 numbers are 1/8 apart: sampler and trainer would disagree.
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:  # no fp32 copies of the inputs
        out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
        return out.unflatten(0, a.shape[:-2])
    return a.float() @ b.float()


def merged_attention(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    prompt_bias: Tensor,
) -> Tensor:
    """`two_part_attention` by torch's fused CPU kernel: over all own keys, without gradient.

    `two_part_attention` is its slow twin.
    """
    G = q.shape[1]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # The kernel returns its output and the logarithm of its sum of exponentials.
    from_prompt, prompt_sum = attend(_by_prompt(q), prompt_k, prompt_v, attn_mask=prompt_bias)
    from_own, own_sum = attend(q.flatten(0, 1), own_k, own_v)
    from_prompt = _by_completion(from_prompt, G).flatten(0, 1)  # (N * G, K, H / K, d)
    prompt_sum = _by_completion(prompt_sum, G).flatten(0, 1)  # (N * G, K, H / K)

    # One softmax over both parts would weight the outputs in proportion to their sums. The prompt's
    # share is the sigmoid of the difference of the logarithms.
    prompt_share = torch.sigmoid(prompt_sum - own_sum)[..., None]
    merged = torch.lerp(from_own, from_prompt, prompt_share.to(q.dtype))
    return merged.unflatten(0, (-1, G))


class SharedPrefix:
    """The `attend` of the update: N prompts with G completions each, packed without padding.

    A prompt token attends to its past. A completion token attends to its whole prompt and to its
    own past, never to the other completions of the group. The gradients of all G completions flow
    into one set of prompt keys and values. The slow twin is the plain forward of G sequences, each
    with its own copy of the prompt.
    """

    def __init__(
        self,
        prompt_NP: Tensor,
        own_NGT: Tensor,
        heads_each: int,
        dtype: torch.dtype,
    ) -> None:
        """Prepare the masks, which all layers share.

        Args:
            prompt_NP: padding mask of the prompts, bool (N, P), True on real tokens.
            own_NGT: padding mask of the completions, bool (N, G, T).
            heads_each: query heads per KV head, H / K.
            dtype: of queries and keys.
        """
        self.prompts = _Packing(prompt_NP)
        self.completions = _Packing(own_NGT)
        # Added to the completions' scores: 0 or -inf, (N * G, 1, H / K * T, P + T).
        N, G, T = own_NGT.shape
        P = prompt_NP.shape[1]
        # If the row stride is not a multiple of 8, CUDA's kernels copy the bias in every layer.
        aligned = (P + T + 7) // 8 * 8
        bias = torch.zeros(N, T, aligned, dtype=dtype, device=own_NGT.device)
        bias[..., :P].masked_fill_(~prompt_NP[:, None], float("-inf"))
        # There is no padding before a real token, so one triangle serves all completions.
        future = torch.full((T, T), float("-inf"), device=own_NGT.device).triu(1)
        bias[..., P : P + T] = future
        rows = bias.repeat(1, heads_each, 1)  # (N, H / K * T, aligned)
        rows = rows.repeat_interleave(G, dim=0)
        self.bias = rows[:, None, :, : P + T]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, L, d), k and v (1, K, L, d) -> (1, H, L, d).

        L counts the packed tokens: first those of all prompts, then those of all completions.
        """
        # Padding exists only inside attention; the rest of the layer runs on the packed row.
        prompt_q, own_q = self._split(q)
        prompt_k, own_k = self._split(k)
        prompt_v, own_v = self._split(v)
        out = causal_attention(prompt_q, prompt_k, prompt_v)
        out = self.prompts.pack(out.transpose(1, 2))
        if len(self.completions.places):  # none if every completion is a single token
            own = _prefixed_attention(own_q, prompt_k, prompt_v, own_k, own_v, self.bias)
            out = torch.cat((out, self.completions.pack(own)))
        return out.transpose(0, 1)[None]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, heads, L, d) -> padded prompts (N, heads, P, d), completions (N, G, T, heads, d)."""
        tokens = x[0].transpose(0, 1)  # (L, heads, d)
        sizes = [len(self.prompts.places), len(self.completions.places)]
        prompt_tokens, own_tokens = tokens.split(sizes)
        prompts = self.prompts.pad(prompt_tokens)
        completions = self.completions.pad(own_tokens)
        return prompts.transpose(1, 2), completions


class _Packing:
    """Converts between a packed row of M real tokens and a padded batch of them."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.places = mask.flatten().nonzero()[:, 0]
        self.full = len(self.places) == mask.numel()  # no padding: nothing to copy

    def pad(self, packed: Tensor) -> Tensor:
        """(M, heads, d) -> (*mask.shape, heads, d), zeros on padding."""
        if not self.full:
            padded = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
            packed = padded.index_copy(0, self.places, packed)
        return packed.unflatten(0, self.mask.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """(*mask.shape, heads, d) -> (M, heads, d)."""
        tokens = padded.flatten(0, -3)
        return tokens if self.full else tokens.index_select(0, self.places)


def _prefixed_attention(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    bias: Tensor,
) -> Tensor:
    """`two_part_attention` for T queries per completion, by torch's fused kernel.

    The kernel never holds the scores of all heads.

    Args:
        q: queries (N, G, T, H, d).
        prompt_k, prompt_v: (N, K, P, d).
        own_k, own_v: (N, G, T, K, d).
        bias: (N * G, 1, H / K * T, P + T), added to the scores.

    Returns:
        (N, G, T, H, d).
    """
    G, T = q.shape[1:3]
    K = prompt_k.shape[1]
    # The query heads of a KV head are passed as further queries of a single head. So one bias, the
    # size of one head's scores, serves all heads and layers.
    by_head = q.unflatten(3, (K, -1)).permute(0, 1, 3, 4, 2, 5)  # (N, G, K, H / K, T, d)
    queries = by_head.flatten(3, 4).flatten(0, 1)  # (N * G, K, H / K * T, d)
    # The kernel takes one set of keys, so each layer keeps G copies of the prompt's keys for the
    # backward pass. With few KV heads these are small compared with the scores of H heads.
    k = _joined(prompt_k, own_k)
    v = _joined(prompt_v, own_v)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias)
    by_head = out.unflatten(2, (-1, T)).unflatten(0, (-1, G))
    return by_head.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)


def _joined(prompt: Tensor, own: Tensor) -> Tensor:
    """Prompt keys (N, K, P, d) joined with own keys (N, G, T, K, d): (N * G, K, P + T, d)."""
    G = own.shape[1]
    prompts = prompt.expand(G, *prompt.shape).transpose(0, 1)
    joined = torch.cat((prompts, own.transpose(2, 3)), dim=3)
    return joined.flatten(0, 1)
