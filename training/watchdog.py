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

Rows = Sequence[dict[str, float]]


def recent(rows: Rows) -> list[dict[str, float]]:
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
    lines = {name: rule(rewarded) for name, rule in RULES.items()}
    return {name: line for name, line in lines.items() if line}


def _mean(rows: Rows, name: str) -> float:
    """Mean over rows that have the number; 0 if none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / max(1, len(values))


def _kl_blow_up(rows: Rows) -> str:
    kl = _mean(rows[-WINDOW:], "kl")
    if kl < 1.0:
        return ""
    return f"the KL to the base is {kl:.2g} nats per token: lower learning_rate or raise beta"


def _length_collapse(rows: Rows) -> str:
    first = _mean(rows[:WINDOW], "completions/mean_length")
    last = _mean(rows[-WINDOW:], "completions/mean_length")
    if last > first / 4:
        return ""
    shrank = f"completions shrank from {first:.0f} to {last:.0f} tokens"
    return f"{shrank}: look whether any reasoning is left; raise beta or lower learning_rate"


def _truncated(rows: Rows) -> str:
    share = _mean(rows[-WINDOW:], "completions/clipped_ratio")
    if share < 0.5:
        return ""
    hit = f"{share:.0%} of the completions hit the length limit"
    return f"{hit}: raise max_new_tokens, or see whether they ramble"


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


def _sampler_apart(rows: Rows) -> str:
    gap = _mean(rows[-WINDOW:], "sampler_gap")
    if gap < 0.1:
        return ""
    differ = f"sampler and trainer differ by {gap:.2g} nats per token"
    return f"{differ}: more than rounding; try dtype float32"


RULES: dict[str, Callable[[Rows], str]] = {
    "KL blow-up": _kl_blow_up,
    "length collapse": _length_collapse,
    "truncated": _truncated,
    "all groups equal": _all_groups_equal,
    "only the form": _only_the_form,
    "sampler apart": _sampler_apart,
}
