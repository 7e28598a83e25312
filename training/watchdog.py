"""Detects well-known training failures as they start, and gives a hint for each.

The thresholds are our own, and coarse: an alarm is only a reason to look at the curves and the
completions.
"""

from collections.abc import Callable, Sequence

WINDOW = 10
"""Number of steps that rules average over, so that a single odd batch raises no alarm."""

LONG = 50
"""Number of steps without a rise after which a metric counts as flat."""

LEARNED = 0.8
"""Accuracy above which equal rewards, or no further rise, are normal at the end of a good run."""

Rows = Sequence[dict[str, float | None]]


def recent(rows: Rows) -> list[dict[str, float | None]]:
    """The rows that the rules look at: the first and the last ones of all steps."""
    return [*rows[:WINDOW], *rows[WINDOW:][-LONG - WINDOW :]]


def alarms(rows: Rows) -> dict[str, str]:
    """The alarms at the end of `rows`, the metrics of all steps so far (or `recent` of them).

    Returns: name of the rule -> one line with a hint.
    """
    # SFT steps, and steps without a readable image, have no reward.
    rewarded = [row for row in rows if row.get("reward") is not None]
    if len(rewarded) < WINDOW:
        return {}
    lines = {}
    for name, (metric, limit, hint) in LIMITS.items():
        value = _mean(rewarded[-WINDOW:], metric)
        lines[name] = hint.format(value) if value >= limit else ""
    for name, rule in RULES.items():
        lines[name] = rule(rewarded)
    return {name: line for name, line in lines.items() if line}


def _mean(rows: Rows, name: str) -> float:
    """Mean over the rows that have this metric; 0 if none has it."""
    values = [row.get(name) for row in rows]
    numbers = [value for value in values if value is not None]
    return sum(numbers) / max(1, len(numbers))


def _length_collapse(rows: Rows) -> str:
    first = _mean(rows[:WINDOW], "completions/mean_length")
    last = _mean(rows[-WINDOW:], "completions/mean_length")
    if last > first / 4:
        return ""
    shrank = f"completions shrank from {first:.0f} to {last:.0f} tokens"
    return f"{shrank}: check whether any reasoning is left; raise beta or lower learning_rate"


def _all_groups_equal(rows: Rows) -> str:
    share = _mean(rows[-WINDOW:], "frac_reward_zero_std")
    accuracy = _mean(rows[-WINDOW:], "rewards/accuracy")
    if share < 0.9 or accuracy > LEARNED:
        return ""
    equal = f"all rewards are equal in {share:.0%} of the groups (accuracy {accuracy:.0%})"
    hint = "raise group_size or temperature, or use easier questions"
    return f"{equal}, so almost nothing is learned: {hint}"


def _only_the_format(rows: Rows) -> str:
    if len(rows) < LONG + WINDOW:
        return ""
    early, late = rows[-LONG - WINDOW : -LONG], rows[-WINDOW:]
    formatted = _mean(late, "rewards/format")
    before, after = _mean(early, "rewards/accuracy"), _mean(late, "rewards/accuracy")
    if formatted < 0.95 or after > LEARNED or after - before > 0.02:
        return ""
    flat = f"accuracy has not risen for {LONG} steps ({before:.0%} then, {after:.0%} now)"
    hint = "the questions may be too hard for the base, or its answers may not depend on the image"
    return f"the format is learned ({formatted:.0%}), but {flat}: {hint}"


LIMITS = {
    "KL blow-up": (
        "kl",
        1.0,
        "the KL from the base model is {:.2g} nats per token: lower learning_rate or raise beta",
    ),
    "truncated": (
        "completions/clipped_ratio",
        0.5,
        "{:.0%} of the completions hit the length limit: raise max_new_tokens, "
        "or check whether they ramble",
    ),
    "sampler mismatch": (
        "sampler_gap",
        0.1,  # it is about 1e-6 in fp32, and 1e-2 in bf16
        "sampler and trainer differ by {:.2g} nats per token, more than rounding error: "
        "try dtype float32",
    ),
}
"""Metrics that must stay below a limit: name of the rule -> metric, limit, hint."""

RULES: dict[str, Callable[[Rows], str]] = {
    "length collapse": _length_collapse,
    "all groups equal": _all_groups_equal,
    "only the format": _only_the_format,
}
"""Rules that need more than one metric; they return a hint, or ""."""
