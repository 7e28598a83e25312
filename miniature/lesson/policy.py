"""A policy that is a table of logits, small enough to list every completion.

There are three letters and an end token, and a completion has at most three tokens: 40 completions
in all. The policy has one row of logits for each question and prefix. A question asks for a letter;
a completion is right, and has reward 1, if it ends with that letter and the end token.

Suffixes of names: Q questions, P prefixes, V tokens, O completions, T tokens of a completion. Where
a function takes a table (Q, P, V), it also takes many of them (R, Q, P, V).
"""

from itertools import product

import torch
from torch import Tensor
from torch.func import grad

LETTERS = "abc"
END = "."
TOKENS = LETTERS + END
LIMIT = 3
"""`max_new_tokens`: a completion of three letters is truncated."""


def words(length: int) -> list[str]:
    return ["".join(letters) for letters in product(LETTERS, repeat=length)]


PREFIXES = words(0) + words(1) + words(2)
COMPLETIONS = [prefix + END for prefix in PREFIXES] + words(LIMIT)

QUESTIONS = {
    "nearly hopeless": ("a", -0.5),
    "hard": ("b", 0.5),
    "even": ("c", 2.0),
    "nearly solved": ("a", 4.5),
}
"""Name -> its letter, and what the start adds to the logits of the tokens that lead to a reward."""

PREFIXES_OT = torch.full((len(COMPLETIONS), LIMIT), -1)
"""Each token's prefix, as an index into PREFIXES; -1 is padding."""
TOKENS_OT = PREFIXES_OT.clone()
for o, completion in enumerate(COMPLETIONS):
    for t, token in enumerate(completion):
        PREFIXES_OT[o, t] = PREFIXES.index(completion[:t])
        TOKENS_OT[o, t] = TOKENS.index(token)
MASK_OT = TOKENS_OT >= 0


def random_table(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(QUESTIONS), len(PREFIXES), len(TOKENS))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


START = random_table(seed=0) / 2
"""The logits that all measurements and runs start from, (Q, P, V). They are also the reference."""
REWARDS_QO = torch.zeros(len(QUESTIONS), len(COMPLETIONS), dtype=torch.float64)
for q, (letter, ease) in enumerate(QUESTIONS.values()):
    for o, completion in enumerate(COMPLETIONS):
        REWARDS_QO[q, o] = completion.endswith(letter + END)
    for p, prefix in enumerate(PREFIXES):
        next_token = END if prefix.endswith(letter) else letter
        START[q, p, TOKENS.index(next_token)] += ease


def completion_logprobs(logits_QPV: Tensor) -> Tensor:
    """log pi(o_t | q, o_<t) of every token of every completion, (Q, O, T); 0 on padding."""
    logp_QPV = logits_QPV.log_softmax(-1)
    return logp_QPV[..., PREFIXES_OT, TOKENS_OT].masked_fill(~MASK_OT, 0.0)


def probabilities(logits_QPV: Tensor) -> Tensor:
    """p(o | q) of every completion, (Q, O)."""
    return completion_logprobs(logits_QPV).sum(-1).exp()


def expected_rewards(logits_QPV: Tensor) -> Tensor:
    """sum_o p(o | q) r(q, o) of every question, (Q,)."""
    return (probabilities(logits_QPV) * REWARDS_QO).sum(-1)


def expected_reward(logits_QPV: Tensor) -> Tensor:
    """The mean over questions: what training is meant to raise."""
    return expected_rewards(logits_QPV).mean(-1)


def exact_gradient(logits_QPV: Tensor) -> Tensor:
    """The gradient of the expected reward, (Q, P, V), from a sum over all completions.

    It is divided by LIMIT, because the constant average of the loss divides by G * LIMIT.
    """
    return grad(expected_reward)(logits_QPV) / LIMIT


def divergence(logits_QPV: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) of whole completions, the mean over questions."""
    logp_QO = completion_logprobs(logits_QPV).sum(-1)
    ref_QO = completion_logprobs(START).sum(-1)
    return (logp_QO.exp() * (logp_QO - ref_QO)).sum(-1).mean()


def divergence_of_tokens(logits_QPV: Tensor, reverse: bool = False) -> Tensor:
    """The divergence of each next-token distribution, summed along completions that pi_theta
    sampled, the mean over questions. The gradient takes those completions as given.

    Without `reverse` its value is that of `divergence`; with it, it sums KL(pi_ref || pi_theta).
    """
    logp_QPV, logref_QPV = logits_QPV.log_softmax(-1), START.log_softmax(-1)
    if reverse:
        logp_QPV, logref_QPV = logref_QPV, logp_QPV
    kl_QP = (logp_QPV.exp() * (logp_QPV - logref_QPV)).sum(-1)
    kl_QO = (kl_QP[:, PREFIXES_OT] * MASK_OT).sum(-1)
    return (probabilities(logits_QPV).detach() * kl_QO).sum(-1).mean()
