"""Intervals and tests for counts of right answers, written out: each is a few lines and checked
against scipy.
"""

import math


def wilson(right: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a rate (Wilson 1927, JASA 22:209), 95 % by default; `total` at least 1.

    Unlike the textbook's p +- z sqrt(p (1 - p) / n) it stays within 0 and 1 and holds its level
    near both.
    """
    p = right / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, (centre - spread) / (1 + z * z / total)), min(
        1.0, (centre + spread) / (1 + z * z / total)
    )


def binomial_tail(right: int, total: int, chance: float) -> float:
    """Probability of at least `right` of `total` by luck alone, where each is right with
    probability `chance`.
    """
    if chance in (0, 1):
        return float(right == 0 or chance == 1)

    def log_density(
        k: int,
    ) -> float:  # logarithms, because the coefficients overflow at some 1,000 questions
        ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        return ways + k * math.log(chance) + (total - k) * math.log1p(-chance)

    return min(1.0, sum(math.exp(log_density(k)) for k in range(right, total + 1)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of two models on the same questions (McNemar 1947): of the questions that
    just one of them answered right, were as many the first's as the second's? A binomial test of a
    half; 1 where there are none.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


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
