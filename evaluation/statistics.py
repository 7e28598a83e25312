"""Intervals and tests for counts of right answers, each a few lines and checked against scipy."""

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
from torch.distributions import Binomial

Z = 1.96  # standard deviations of a normal distribution to either side that hold 95 % of it


def wilson(right: float, total: int) -> tuple[float, float]:
    """Score interval of 95 % of a rate (Wilson 1927, JASA 22:209); `total` at least 1.

    Unlike the textbook's p +- z sqrt(p (1 - p) / n) it stays within 0 and 1, and close to its level
    near both.
    """
    p = right / total
    zz = Z * Z
    centre = p + zz / (2 * total)
    variance = p * (1 - p) / total + zz / (4 * total * total)
    half_width = Z * math.sqrt(variance)
    scale = 1 + zz / total
    # Rounding may leave the ends of 0 and 1 by a hair.
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def binomial_tail(right: int, total: int, chance: float) -> float:
    """Probability of at least `right` of `total` by luck, each right with probability `chance`."""
    if chance in (0, 1):  # the logarithm of 0 does not exist
        return float(right == 0 or chance == 1)
    # In double precision: single errs by 1 in 10,000 at some thousand questions.
    counts = torch.arange(right, total + 1, dtype=torch.float64)
    densities = Binomial(total, torch.full_like(counts, chance)).log_prob(counts).exp()
    return min(1.0, float(densities.sum()))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of two models on the same questions (McNemar 1947): of the questions that
    just one of them answered right, were as many the first's as the second's? A binomial test of a
    half; 1 where there are none.
    """
    # Where both are right, or both wrong, the two models do not differ: those do not count.
    n = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def grouped(keys: Iterable[Any], values: Iterable[Any]) -> dict[Any, list[Any]]:
    """The values of each key, in the order of the keys' first occurrence."""
    groups = defaultdict(list)
    for key, value in zip(keys, values, strict=False):
        groups[key].append(value)
    return groups


def places_by(keys: Iterable[str]) -> dict[str, list[int]]:
    """Where each key stands: the places of each modality's rows."""
    return grouped(keys, count())


def percent(rate: float) -> str:
    """A rate in percent with one digit, halves rounded up: "36.8" for 0.3675.

    A rate is a mean of credits, summed in whatever order: without the billionth, 0.3675 would be
    printed as 36.7 here and as 36.8 there.
    """
    return f"{100 * rate + 1e-9:.1f}"


def percent_with_interval(right: float, total: int) -> str:
    """A rate and Wilson's 95 % interval as every table shows them: "93.3 (89.9 to 95.6)"."""
    low, high = wilson(right, total)
    return f"{percent(right / total)} ({percent(low)} to {percent(high)})"
