"""Attention where G completions share one prompt: each fast form beside the obvious one that tests
compare it with.

A decoder layer computes queries, keys and values and hands them to an `attend` function; which
tokens attend to which is decided here and nowhere else.

Letters: N prompts of P tokens, G completions of T tokens each, S keys of a completion; H query
heads and K key-value heads of size d. Each KV head serves H / K query heads in a row (grouped-query
attention, arXiv 2305.13245).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Off for the whole process: torch tries cuDNN's kernel first on Hopper GPUs. Its backward can give
# NaN where there is a mask (pytorch/pytorch#196678, huggingface/trl#7181), and it builds a plan for
# every new shape, of which packed completions have a new one in each micro-batch. Flash and
# memory-efficient kernels stay.
torch.backends.cuda.enable_cudnn_sdp(False)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every token to itself and its past.

    Args:
        q: (B, H, L, d).
        k, v: (B, K, L, d).

    Returns:
        (B, H, L, d).
    """
    # Right-padding needs no mask: it lies after all real tokens, so that none attends to it.
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
    """Attention of one query a completion to a prompt that a group shares and to the completion's
    own tokens, without copies of the prompt.

    The scores are two matrix products, the first over all G completions at once ("bifurcated
    attention", arXiv 2403.08845); one softmax runs over both.

    Args:
        q: queries (N, G, K, H / K, d).
        prompt_k, prompt_v: (N, K, P, d), stored once per group.
        own_k, own_v: (N * G, K, S, d), the completion's own keys and values.
        prompt_bias: (N, 1, 1, P), 0 or, on padding, -inf.
        own_mask: bool (S,), True on the own keys that count; None if all do.

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
    """(N, G, K, R, ...) -> (N, K, G * R, ...): the rows of a whole group, for one product."""
    return x.transpose(1, 2).flatten(2, 3)


def _by_completion(x: Tensor, G: int) -> Tensor:
    """(N, K, G * R, ...) -> (N, G, K, R, ...)."""
    return x.unflatten(2, (G, -1)).transpose(1, 2)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product of scores, at least fp32 whatever comes in."""
    # In bf16, whose steps near 30 are an eighth, sampler and trainer would disagree.
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:  # without fp32 copies of what comes in
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
    """`two_part_attention`, its twin, of all own keys and without gradient, by torch's fused kernel
    for processors.
    """
    G = q.shape[1]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # Beside its output the kernel gives the logarithm of its sum of exponentials.
    from_prompt, prompt_sum = attend(_by_prompt(q), prompt_k, prompt_v, attn_mask=prompt_bias)
    from_own, own_sum = attend(q.flatten(0, 1), own_k, own_v)
    from_prompt = _by_completion(from_prompt, G).flatten(0, 1)  # (N * G, K, H / K, d)
    prompt_sum = _by_completion(prompt_sum, G).flatten(0, 1)  # (N * G, K, H / K)

    # One softmax over both would weigh the outputs in proportion to their sums, that is by the
    # sigmoid of the logarithms' difference.
    prompt_share = torch.sigmoid(prompt_sum - own_sum)[..., None]
    merged = torch.lerp(from_own, from_prompt, prompt_share.to(q.dtype))
    return merged.unflatten(0, (-1, G))


class SharedPrefix:
    """The update's `attend`: N prompts and their G completions each, packed into one row of real
    tokens only.

    A prompt's token attends to its past; a completion's to its whole prompt and its own past, never
    to its sisters. Gradients of all G flow into the prompt's one set of keys and values. The twin
    is the plain forward of G sequences, each with a prompt of its own.
    """

    def __init__(
        self,
        prompt_NP: Tensor,
        own_NGT: Tensor,
        heads_each: int,
        dtype: torch.dtype,
    ) -> None:
        """Plan the attention of all layers.

        Args:
            prompt_NP: the prompts' padding mask, bool (N, P), True on real tokens.
            own_NGT: the completions', bool (N, G, T).
            heads_each: query heads of a KV head, H / K.
            dtype: that of queries and keys.
        """
        self.prompts = _Packing(prompt_NP)
        self.completions = _Packing(own_NGT)
        # What is added to the completions' scores: 0 or -inf, (N * G, 1, H / K * T, P + T).
        N, G, T = own_NGT.shape
        P = prompt_NP.shape[1]
        # CUDA's kernels would copy rows of another stride, once for every layer.
        aligned = (P + T + 7) // 8 * 8
        bias = torch.zeros(N, T, aligned, dtype=dtype, device=own_NGT.device)
        bias[..., :P].masked_fill_(~prompt_NP[:, None], float("-inf"))
        # The past of a real token holds no padding, so that one triangle serves all completions.
        future = torch.full((T, T), float("-inf"), device=own_NGT.device).triu(1)
        bias[..., P : P + T] = future
        rows = bias.repeat(1, heads_each, 1)  # (N, H / K * T, aligned)
        rows = rows.repeat_interleave(G, dim=0)
        self.bias = rows[:, None, :, : P + T]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, L, d), k and v (1, K, L, d) -> (1, H, L, d), L the number of packed tokens: all
        prompts' first, then all completions'.
        """
        # Padding exists within attention alone: the rest of a layer runs on the packed row.
        prompt_q, own_q = self._split(q)
        prompt_k, own_k = self._split(k)
        prompt_v, own_v = self._split(v)
        out = causal_attention(prompt_q, prompt_k, prompt_v)
        out = self.prompts.pack(out.transpose(1, 2))
        if len(self.completions.places):  # none where every completion is a single token
            own = _prefixed_attention(own_q, prompt_k, prompt_v, own_k, own_v, self.bias)
            out = torch.cat((out, self.completions.pack(own)))
        return out.transpose(0, 1)[None]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, heads, L, d) -> the prompts' (N, heads, P, d) and the completions' (N, G, T, heads,
        d), padded.
        """
        tokens = x[0].transpose(0, 1)  # (L, heads, d)
        sizes = [len(self.prompts.places), len(self.completions.places)]
        prompt_tokens, own_tokens = tokens.split(sizes)
        prompts = self.prompts.pad(prompt_tokens)
        completions = self.completions.pad(own_tokens)
        return prompts.transpose(1, 2), completions


class _Packing:
    """The way from a row of M real tokens to a padded batch of them and back."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.places = mask.flatten().nonzero()[:, 0]
        self.full = len(self.places) == mask.numel()  # then both ways are free

    def pad(self, packed: Tensor) -> Tensor:
        """(M, heads, d) -> the mask's shape and (heads, d), zeros on padding."""
        if not self.full:
            padded = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
            packed = padded.index_copy(0, self.places, packed)
        return packed.unflatten(0, self.mask.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """The mask's shape and (heads, d) -> (M, heads, d)."""
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
    """As `two_part_attention` for many queries, by the fused kernel, which never holds the scores
    of all heads.

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
    # The query heads of a KV head go in as further queries of that one head, so that one bias, as
    # large as the scores of one head, serves all heads and layers.
    by_head = q.unflatten(3, (K, -1)).permute(0, 1, 3, 4, 2, 5)  # (N, G, K, H / K, T, d)
    queries = by_head.flatten(3, 4).flatten(0, 1)  # (N * G, K, H / K * T, d)
    # The kernel takes one set of keys, so that each layer keeps G copies of the prompt's for
    # backward; with few KV heads that is little beside scores of H heads.
    k = _joined(prompt_k, own_k)
    v = _joined(prompt_v, own_v)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias)
    by_head = out.unflatten(2, (-1, T)).unflatten(0, (-1, G))
    return by_head.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)


def _joined(prompt: Tensor, own: Tensor) -> Tensor:
    """Keys (N, K, P, d) of prompts before those (N, G, T, K, d) of each of their completions: (N *
    G, K, P + T, d).
    """
    G = own.shape[1]
    prompts = prompt.expand(G, *prompt.shape).transpose(0, 1)
    joined = torch.cat((prompts, own.transpose(2, 3)), dim=3)
    return joined.flatten(0, 1)
