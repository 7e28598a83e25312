"""The watchdog's rules: each raises one alarm when its failure starts, and none on good runs."""

import json
from pathlib import Path

import pytest
from test_train import rows, run, vowel_score
from tiny_run import write_run

from training.watchdog import LIMITS, LONG, RULES, WINDOW, alarms, recent

HEALTHY = {
    "reward": 1.0,
    "rewards/format": 0.6,
    "rewards/accuracy": 0.4,
    "kl": 0.02,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.05,
    "frac_reward_zero_std": 0.2,
    "sampler_gap": 1e-3,
}


def curve(steps: int, **last: float) -> list[dict[str, float]]:
    """Metrics that move linearly from those of a healthy run to `last`."""
    return [
        {name: a + (last.get(name, a) - a) * i / (steps - 1) for name, a in HEALTHY.items()}
        for i in range(steps)
    ]


def first_alarm(steps: list[dict[str, float]], name: str) -> int:
    """The first step at which the rule raises an alarm; the number of steps if it never does."""
    return next(
        (i for i in range(len(steps)) if name in alarms(recent(steps[: i + 1]))), len(steps)
    )


@pytest.mark.parametrize(
    ("name", "last", "hint"),
    [
        ("KL blow-up", {"kl": 3.0}, "learning_rate"),
        ("length collapse", {"completions/mean_length": 5.0}, "beta"),
        ("truncated", {"completions/clipped_ratio": 1.0}, "max_new_tokens"),
        ("all groups equal", {"frac_reward_zero_std": 1.0}, "group_size"),
        ("only the format", {"rewards/format": 1.0, "reward": 1.4}, "image"),
        ("sampler mismatch", {"sampler_gap": 0.5}, "float32"),
    ],
)
def test_each_failure_raises_an_alarm_with_a_hint_between_its_start_and_the_end(name, last, hint):
    steps = curve(200, **last) + [HEALTHY | last] * 30
    first = first_alarm(steps, name)
    assert WINDOW <= first < len(steps)
    lines = alarms(recent(steps))
    assert hint in lines[name] and "\n" not in lines[name]
    assert first > 30  # not before anything has gone wrong


def test_a_run_that_learns_raises_no_alarm_even_if_it_is_noisy():
    good = {
        "rewards/format": 1.0,
        "rewards/accuracy": 0.95,
        "reward": 1.95,
        "kl": 0.2,
        "frac_reward_zero_std": 0.8,
    }
    steps = curve(300, **good, **{"completions/mean_length": 60.0})
    odd = HEALTHY | {
        "kl": 9.0,
        "completions/mean_length": 1.0,
        "completions/clipped_ratio": 1.0,
        "frac_reward_zero_std": 1.0,
    }
    steps[100] = steps[200] = odd  # one odd batch is no failure
    kl = [row | {"kl": min(row["kl"], 5.0)} for row in steps]
    assert all(not alarms(recent(kl[:i])) for i in range(len(kl)))


def test_steps_without_rewards_or_metrics_are_ignored():
    assert alarms([{"loss": 1.0}] * 100) == {} == alarms([]) == alarms([HEALTHY] * (WINDOW - 1))
    assert set(alarms([HEALTHY | {"kl": None}] * 30)) == set()


def test_the_recent_rows_of_a_long_run_are_enough_for_the_rules():
    for last in ({"kl": 3.0}, {"completions/mean_length": 5.0}, {"rewards/format": 1.0}):
        steps = curve(400, **last)
        kept = []
        for row in steps:
            kept = recent([*kept, row])
        assert len(kept) == 2 * WINDOW + LONG and alarms(kept) == alarms(steps)
    assert len(LIMITS) + len(RULES) == 6


def test_a_run_that_blows_up_raises_one_alarm_even_if_it_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    config = write_run(tmp_path, test_questions=[], learning_rate=0.03, steps=16, save_every=13)
    assert run(monkeypatch, config) == 0
    (tmp_path / "run" / "checkpoints" / "step-000016").rename(tmp_path / "gone")
    assert run(monkeypatch, config) == 0
    blow_ups = [
        row
        for row in rows(tmp_path / "run" / "incidents.jsonl")
        if row["says"].startswith("KL blow-up")
    ]
    assert (
        len(blow_ups) == 1
        and blow_ups[0]["kind"] == "watchdog"
        and blow_ups[0]["step"] >= WINDOW - 1
    )
    assert "KL blow-up" in capsys.readouterr().out


def test_the_default_run_raises_no_alarm():
    """On its real metrics, if it has been run on this machine."""
    file = Path(__file__).parent.parent / "runs" / "miniature" / "metrics.jsonl"
    if not file.exists():
        pytest.skip("needs runs/miniature, made by `make train`")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(not alarms(recent(steps[:i])) for i in range(len(steps)))
