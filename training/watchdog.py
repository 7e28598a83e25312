"""Names the known ways in which a run goes wrong, when they start, with a hint.

The thresholds are ours and coarse: a rule that speaks wants a look at the curves and the
completions, no more.
"""

from collections.abc import Callable, Sequence

WINDOW = 10
"""Steps that a rule averages over, so that one odd batch raises no alarm."""

LONG = 50
"""Steps after which something that should rise and does not is called flat."""

LEARNED = 0.8
"""Accuracy above which groups of equal rewards, or no further rise, are how a run ends well."""

Rows = Sequence[dict[str, float | None]]


def recent(rows: Rows) -> list[dict[str, float | None]]:
    """Of the metrics of all steps those that the rules look at: the first and the last ones."""
    return [*rows[:WINDOW], *rows[WINDOW:][-LONG - WINDOW :]]


def alarms(rows: Rows) -> dict[str, str]:
    """What is wrong at the end of `rows`, the metrics of the steps so far (`recent` ones do).

    Returns, by the name of the rule that speaks, one line with a hint.
    """
    # Supervised steps and skipped ones have no reward.
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
    """Mean over rows that have the number; 0 if none has."""
    values = [row.get(name) for row in rows]
    numbers = [value for value in values if value is not None]
    return sum(numbers) / max(1, len(numbers))


def _length_collapse(rows: Rows) -> str:
    first = _mean(rows[:WINDOW], "completions/mean_length")
    last = _mean(rows[-WINDOW:], "completions/mean_length")
    if last > first / 4:
        return ""
    shrank = f"completions shrank from {first:.0f} to {last:.0f} tokens"
    return f"{shrank}: look whether any reasoning is left; raise beta or lower learning_rate"


def _all_groups_equal(rows: Rows) -> str:
    share = _mean(rows[-WINDOW:], "frac_reward_zero_std")
    accuracy = _mean(rows[-WINDOW:], "rewards/accuracy")
    if share < 0.9 or accuracy > LEARNED:
        return ""
    equal = f"in {share:.0%} of the groups all rewards are equal (accuracy {accuracy:.0%})"
    hint = "raise group_size or temperature, or take easier questions"
    return f"{equal}, so that next to nothing is learned: {hint}"


def _only_the_form(rows: Rows) -> str:
    if len(rows) < LONG + WINDOW:
        return ""
    early, late = rows[-LONG - WINDOW : -LONG], rows[-WINDOW:]
    form = _mean(late, "rewards/format")
    before, after = _mean(early, "rewards/accuracy"), _mean(late, "rewards/accuracy")
    if form < 0.95 or after > LEARNED or after - before > 0.02:
        return ""
    stood = f"accuracy has stood at {after:.0%} for {LONG} steps ({before:.0%} before)"
    hint = "the questions may be too hard for the base, or its answers may not depend on the image"
    return f"the form is learned ({form:.0%}), but {stood}: {hint}"


LIMITS = {
    "KL blow-up": (
        "kl",
        1.0,
        "the KL to the base is {:.2g} nats per token: lower learning_rate or raise beta",
    ),
    "truncated": (
        "completions/clipped_ratio",
        0.5,
        "{:.0%} of the completions hit the length limit: raise max_new_tokens, "
        "or see whether they ramble",
    ),
    "sampler apart": (
        "sampler_gap",
        0.1,  # in fp32 it is 1e-6, in bf16 some 1e-2
        "sampler and trainer differ by {:.2g} nats per token: more than rounding; "
        "try dtype float32",
    ),
}
"""Metrics that must stay below a limit: name of the rule -> metric, limit, hint."""

RULES: dict[str, Callable[[Rows], str]] = {
    "length collapse": _length_collapse,
    "all groups equal": _all_groups_equal,
    "only the form": _only_the_form,
}
"""Rules that look at more than one number: they return their hint, or ""."""
