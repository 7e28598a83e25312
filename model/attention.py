"""Attention where G completions share one prompt: each fast form beside the obvious one that tests
compare it with.

A decoder layer computes queries, keys and values and hands them to an `attend` function; how tokens
see one another is computed here and nowhere else. Shapes: queries (B, H, L, d); keys and values (B,
K, L, d), each KV head serving H / K query heads in a row (grouped-query attention).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees itself and what lies before it, (B, H, L, d).

    Right-padding needs no mask: a padded token lies after all real ones, so that no real one sees
    it.
    """
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def two_part_attention(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    seen: Tensor | None,
    own_seen: Tensor | None,
) -> Tensor:
    """Softmax over a prompt that a group shares and over each completion's own tokens, without
    copying the prompt.

    The scores of the two parts are two matrix products, the first over all G completions at once
    ("bifurcated attention", arXiv 2403.08845); one softmax runs over both. Scores are fp32 whatever
    comes in: in bf16, whose steps near 30 are an eighth, sampler and trainer would disagree.

    Args:
        q: queries (N, G, H, T, d).
        prompt_k, prompt_v: (N, K, P, d), stored once per group.
        own_k, own_v: (N, G, K, S, d), the completion's own keys and values.
        seen: bool (N, P), False on a prompt's padding; None if there is none.
        own_seen: bool, broadcast to (T, S), True where a query sees an own key; None if it sees
            all.

    Returns:
        (N, G, H, T, d).
    """
    N, G, H, T, d = q.shape
    K, S, P = own_k.shape[2], own_k.shape[3], prompt_k.shape[2]
    q = q.reshape(N, G, K, H // K, T, d)
    shared = q.transpose(1, 2).reshape(
        N, K, G * (H // K) * T, d
    )  # all queries of a KV head, whichever completion they belong to
    prompt_scores = _wide_product(shared, prompt_k.transpose(-1, -2))  # (N, K, G * H/K * T, P)
    own_scores = _wide_product(
        q.reshape(N, G, K, H // K * T, d), own_k.transpose(-1, -2)
    )  # (N, G, K, H/K * T, S)
    if seen is not None:
        prompt_scores = prompt_scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    own_scores = own_scores.view(N, G, K, H // K, T, S)
    if own_seen is not None:
        own_scores = own_scores.masked_fill(~own_seen, float("-inf"))
    prompt_scores = prompt_scores.view(N, K, G, H // K, T, P).transpose(1, 2)
    weights = (
        torch.cat((prompt_scores, own_scores), dim=-1).mul(d**-0.5).softmax(dim=-1).to(q.dtype)
    )
    prompt_weights, own_weights = weights.split((P, S), dim=-1)
    from_prompt = prompt_weights.transpose(1, 2).reshape(N, K, G * (H // K) * T, P) @ prompt_v
    from_own = own_weights.reshape(N, G, K, H // K * T, S) @ own_v
    out = from_prompt.view(N, K, G, H // K, T, d).transpose(1, 2) + from_own.view(
        N, G, K, H // K, T, d
    )
    return out.reshape(N, G, H, T, d)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product, its results at least fp32; on a GPU without fp32 copies of what comes
    in.
    """
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:
        out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
        return out.view(*a.shape[:-1], b.shape[-1])
    return a.float() @ b.float()


def merged_attention(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, prompt_bias: Tensor
) -> Tensor:
    """`two_part_attention` for one query a completion, without gradient, by torch's fused kernel
    for processors.

    Each part's output comes with the logarithm of its sum of exponentials; a softmax over both
    parts weighs the two outputs in proportion to those sums, that is by the sigmoid of the
    logarithms' difference.

    Args: q (N, G, H, 1, d), prompt_k and prompt_v (N, K, P, d), own_k and own_v (N * G, K, S, d),
    all seen, and `prompt_bias` (N, 1, 1, P), 0 or -inf. Returns (N, G, H, 1, d).
    """
    N, G, H, _, d = q.shape
    K, each = prompt_k.shape[1], H // prompt_k.shape[1]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    shared = q.view(N, G, K, each, d).transpose(1, 2).reshape(N, K, G * each, d)
    from_prompt, prompt_sum = attend(
        shared, prompt_k, prompt_v, attn_mask=prompt_bias.expand(-1, -1, G * each, -1)
    )
    from_own, own_sum = attend(q.view(N * G, K, each, d), own_k, own_v)
    share = torch.sigmoid(
        prompt_sum.view(N, K, G, each).transpose(1, 2) - own_sum.view(N, G, K, each)
    )
    from_prompt = from_prompt.reshape(N, K, G, each, d).transpose(1, 2)
    return torch.lerp(
        from_own.reshape(N, G, K, each, d), from_prompt, share[..., None].to(q.dtype)
    ).view(N, G, H, 1, d)


class SharedPrefix:
    """The update's `attend`: N prompts and their G completions each, packed into one row of real
    tokens only.

    A prompt sees itself causally; a completion sees its whole prompt and its own past, never its
    sisters. Gradients of all G flow into the prompt's one set of keys and values. Padding exists
    within attention alone: everything else of a layer runs on the packed row, first the tokens of
    all prompts, then those of all completions.
    """

    def __init__(self, prompt_NP: Tensor, own_NGT: Tensor) -> None:
        """Args: which places of the padded prompts, bool (N, P), and completions, bool (N, G, T),
        are real tokens.
        """
        (N, P), (_, G, T) = prompt_NP.shape, own_NGT.shape
        self.prompt_shape, self.own_shape = (N, P), (N, G, T)
        self.prompt_places, self.own_places = (
            x.flatten().nonzero()[:, 0] for x in (prompt_NP, own_NGT)
        )
        # (N, T, P + T): whom a completion's token sees. Its own later padding hides behind
        # causality.
        past = torch.ones(T, T, dtype=torch.bool, device=own_NGT.device).tril()
        self.seen = torch.cat((prompt_NP[:, None].expand(N, T, P), past.expand(N, T, T)), dim=-1)
        self.bias: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, L, d), k and v (1, K, L, d) -> (1, H, L, d), L the number of packed tokens."""
        (N, P), (_, G, T), H, d = self.prompt_shape, self.own_shape, q.shape[1], q.shape[-1]
        sizes = len(self.prompt_places), len(self.own_places)
        parts = [
            x[0].transpose(0, 1).split(sizes) for x in (q, k, v)
        ]  # (L, heads, d), prompts and completions
        prompt = [
            _padded(x, self.prompt_places, N * P).view(N, P, -1, d).transpose(1, 2)
            for x, _ in parts
        ]
        out = causal_attention(*prompt).transpose(1, 2).reshape(N * P, H, d)
        out = out if len(out) == sizes[0] else out.index_select(0, self.prompt_places)
        if T:
            own = [_padded(x, self.own_places, N * G * T).view(N, G, T, -1, d) for _, x in parts]
            if self.bias is None:  # the same for all layers
                self.bias = _score_bias(self.seen, G, H // own[1].shape[3], q.dtype)
            completions = _prefixed_attention(
                own[0], *prompt[1:], own[1], own[2], self.bias
            ).flatten(0, 2)
            out = torch.cat(
                (
                    out,
                    completions
                    if len(completions) == sizes[1]
                    else completions.index_select(0, self.own_places),
                )
            )
        return out.transpose(0, 1)[None]


def _padded(packed: Tensor, places: Tensor, size: int) -> Tensor:
    """Tokens (M, heads, d) at their places among `size`, zeros elsewhere."""
    return (
        packed
        if len(packed) == size
        else packed.new_zeros(size, *packed.shape[1:]).index_copy(0, places, packed)
    )


def _score_bias(seen_NTS: Tensor, group_size: int, heads_each: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores, 0 or -inf, (N * G, 1, heads_each * T, S), for
    `_prefixed_attention`.
    """
    N, T, S = seen_NTS.shape
    aligned = (
        -(-S // 8) * 8
    )  # rows of another stride would be copied by CUDA's kernels, once for every layer
    bias = torch.zeros(N, T, aligned, dtype=dtype, device=seen_NTS.device)
    bias[..., :S].masked_fill_(~seen_NTS, float("-inf"))
    bias = bias[:, None, None].expand(N, group_size, heads_each, T, aligned)
    return bias.reshape(N * group_size, 1, heads_each * T, aligned)[..., :S]


def _prefixed_attention(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, bias: Tensor
) -> Tensor:
    """As `two_part_attention` for many queries, by the fused kernel, which never holds the scores
    of all heads.

    The kernel takes one set of keys, so that each layer keeps G copies of the prompt's keys and
    values for backward; with few KV heads that is little beside scores of H heads. The query heads
    of a KV head go in as further queries of that one head; the bias is as large as the scores of
    one head in each KV group, and shared by all layers.

    Args: q (N, G, T, H, d), prompt_k and prompt_v (N, K, P, d), own_k and own_v (N, G, T, K, d).
    Returns (N, G, T, H, d).
    """
    N, G, T, H, d = q.shape
    K, P = prompt_k.shape[1:3]
    k, v = (
        torch.cat((prompt[:, None].expand(N, G, K, P, d), own.transpose(2, 3)), dim=3).flatten(0, 1)
        for prompt, own in ((prompt_k, own_k), (prompt_v, own_v))
    )
    rows = q.view(N * G, T, K, H // K, d).permute(0, 2, 3, 1, 4).reshape(N * G, K, H // K * T, d)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias)
    return out.view(N, G, K, H // K, T, d).permute(0, 1, 4, 2, 3, 5).reshape(N, G, T, H, d)
