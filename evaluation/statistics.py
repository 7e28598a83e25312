"""Intervals and tests for counts of right answers, written out: each is a few lines and checked
against scipy.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import count
from typing import Any

Z = 1.96  # standard deviations of a normal distribution to either side that hold 95 % of it


def wilson(right: float, total: int) -> tuple[float, float]:
    """Score interval of 95 % of a rate (Wilson 1927, JASA 22:209); `total` at least 1.

    Unlike the textbook's p +- z sqrt(p (1 - p) / n) it stays within 0 and 1, and close to its level
    near both.
    """
    p, zz = right / total, Z * Z
    centre = p + zz / (2 * total)
    variance = p * (1 - p) / total + zz / (4 * total * total)
    half_width, scale = Z * math.sqrt(variance), 1 + zz / total
    # Rounding may leave the ends of 0 and 1 by a hair.
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def binomial_tail(right: int, total: int, chance: float) -> float:
    """Probability of at least `right` of `total` by luck, each right with probability `chance`."""
    if chance in (0, 1):  # the logarithm of 0 does not exist
        return float(right == 0 or chance == 1)
    densities = (math.exp(_log_density(k, total, chance)) for k in range(right, total + 1))
    return min(1.0, sum(densities))


def _log_density(k: int, total: int, chance: float) -> float:
    # Logarithms, because the coefficients overflow at some 1,000 questions.
    ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
    return ways + k * math.log(chance) + (total - k) * math.log1p(-chance)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of two models on the same questions (McNemar 1947): of the questions that
    just one of them answered right, were as many the first's as the second's? A binomial test of a
    half; 1 where there are none.
    """
    # Where both are right, or both wrong, the two models do not differ: those do not count.
    n, fewer = only_first + only_second, min(only_first, only_second)
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
