"""Intervals and tests for counts of right answers, each a few lines and tested against scipy."""

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
from torch.distributions import Binomial

Z = 1.96  # 95 % of a normal distribution lies within this many standard deviations of its mean


def wilson(right: float, total: int) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927, JASA 22:209). `total` must be at least 1.

    Unlike the textbook's p +- z sqrt(p (1 - p) / n), it stays within 0 and 1, and its coverage
    stays close to 95 % near both.
    """
    p = right / total
    zz = Z * Z
    centre = p + zz / (2 * total)
    variance = p * (1 - p) / total + zz / (4 * total * total)
    half_width = Z * math.sqrt(variance)
    scale = 1 + zz / total
    # Rounding may push the ends slightly past 0 and 1.
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def binomial_tail(right: int, total: int, chance: float) -> float:
    """The probability of at least `right` of `total` if each is right with probability `chance`."""
    if chance in (0, 1):  # the logarithm of 0 is undefined
        return float(right == 0 or chance == 1)
    # In double precision: single is off by 1 in 10,000 at a few thousand questions.
    counts = torch.arange(right, total + 1, dtype=torch.float64)
    densities = Binomial(total, torch.full_like(counts, chance)).log_prob(counts).exp()
    return min(1.0, float(densities.sum()))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of two models on the same questions (McNemar 1947).

    Tests whether the questions that only one of the two answered right are split evenly between
    them; 1 if there are none.
    """
    # Questions that both or neither answered right do not tell the models apart.
    n = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def grouped(keys: Iterable[Any], values: Iterable[Any]) -> dict[Any, list[Any]]:
    """The values of each key, with the keys in order of first occurrence."""
    groups = defaultdict(list)
    for key, value in zip(keys, values, strict=False):
        groups[key].append(value)
    return groups


def places_by(keys: Iterable[str]) -> dict[str, list[int]]:
    """The indices at which each key occurs."""
    return grouped(keys, count())


def percent(rate: float) -> str:
    """A rate in percent with one decimal, halves rounded up: "36.8" for 0.3675.

    Rates are means of credits, summed in any order. Without the 1e-9, their rounding errors would
    print 0.3675 sometimes as 36.7 and sometimes as 36.8.
    """
    return f"{100 * rate + 1e-9:.1f}"


def percent_with_interval(right: float, total: int) -> str:
    """A rate with its 95 % Wilson interval, as in every table: "93.3 (89.9 to 95.6)"."""
    low, high = wilson(right, total)
    return f"{percent(right / total)} ({percent(low)} to {percent(high)})"
