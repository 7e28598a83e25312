"""Attention where G completions share one prompt: each fast form beside the obvious one that tests compare it with.

A decoder layer computes queries, keys and values and hands them to an `attend` function; which tokens see which is
decided here and nowhere else. Shapes: queries (B, H, L, d); keys and values (B, K, L, d), each KV head serving H / K
query heads in a row (grouped-query attention).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees itself and what lies before it, (B, H, L, d).

    Right-padding needs no mask: a padded token lies after all real ones, so that no real one sees it.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def two_part_attention(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    seen: Tensor | None,
    own_seen: Tensor | None,
) -> Tensor:
    """Softmax over a prompt that a group shares and over each completion's own tokens, without copying the prompt.

    The scores of the two parts are two matrix products, the first over all G completions at once ("bifurcated
    attention", arXiv 2403.08845); one softmax runs over both.

    Args:
        q: queries (N, G, H, T, d).
        prompt_k, prompt_v: (N, K, P, d), stored once per group.
        own_k, own_v: (N, G, K, S, d), the completion's own keys and values.
        seen: bool (N, P), False on a prompt's padding; None if there is none.
        own_seen: bool, broadcast to (T, S), True where a query sees an own key; None if it sees all.

    Returns:
        (N, G, H, T, d).
    """
    N, G, H, T, d = q.shape
    K, S, P = own_k.shape[2], own_k.shape[3], prompt_k.shape[2]
    q = (q * d**-0.5).view(N, G, K, H // K, T, d)
    shared = q.transpose(1, 2).reshape(
        N, K, G * (H // K) * T, d
    )  # all queries of a KV head, whichever completion they belong to
    prompt_scores = shared @ prompt_k.transpose(-1, -2)  # (N, K, G * H/K * T, P)
    own_scores = q.reshape(N, G, K, H // K * T, d) @ own_k.transpose(-1, -2)  # (N, G, K, H/K * T, S)
    if seen is not None:
        prompt_scores = prompt_scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    own_scores = own_scores.view(N, G, K, H // K, T, S)
    if own_seen is not None:
        own_scores = own_scores.masked_fill(~own_seen, float("-inf"))
    prompt_scores = prompt_scores.view(N, K, G, H // K, T, P).transpose(1, 2)
    weights = torch.cat((prompt_scores, own_scores), dim=-1).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    prompt_weights, own_weights = weights.split((P, S), dim=-1)
    from_prompt = prompt_weights.transpose(1, 2).reshape(N, K, G * (H // K) * T, P) @ prompt_v
    from_own = own_weights.reshape(N, G, K, H // K * T, S) @ own_v
    out = from_prompt.view(N, K, G, H // K, T, d).transpose(1, 2) + from_own.view(N, G, K, H // K, T, d)
    return out.reshape(N, G, H, T, d)


class SharedPrefix:
    """The update's `attend`: rows are a prompt of P tokens, then its G completions of T tokens each.

    The prompt sees itself causally; a completion sees the whole prompt and its own past, never its sisters. Gradients
    of all G flow into the prompt's one set of keys and values.
    """

    def __init__(self, prompt_lengths_N: Tensor, prompt_size: int, group_size: int) -> None:
        self.prompt_size, self.group_size = prompt_size, group_size
        self.seen = torch.arange(prompt_size, device=prompt_lengths_N.device) < prompt_lengths_N[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        P, G = self.prompt_size, self.group_size
        N, H, L, d = q.shape
        T = (L - P) // G
        prompt = causal_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P])
        own = [x[:, :, P:].unflatten(2, (G, T)).transpose(1, 2) for x in (q, k, v)]
        past = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        answers = two_part_attention(own[0], k[:, :, :P], v[:, :, :P], own[1], own[2], self.seen, past)
        return torch.cat((prompt, answers.transpose(1, 2).reshape(N, H, G * T, d)), dim=2)
