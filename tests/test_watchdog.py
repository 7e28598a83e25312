"""The watchdog's rules: each speaks when its failure starts, once, and is silent on runs that go
well.
"""

import json
from pathlib import Path

import pytest
from test_train import rows, run, vowel_score
from tiny_run import write_run

from training.watchdog import LIMITS, LONG, RULES, WINDOW, alarms, recent

SOUND = {
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
    """Metrics that walk from those of a sound run to `last`."""
    return [
        {name: a + (last.get(name, a) - a) * i / (steps - 1) for name, a in SOUND.items()}
        for i in range(steps)
    ]


def first_alarm(steps: list[dict[str, float]], name: str) -> int:
    """The step at which the rule first speaks; the number of steps if it never does."""
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
        ("only the form", {"rewards/format": 1.0, "reward": 1.4}, "image"),
        ("sampler apart", {"sampler_gap": 0.5}, "float32"),
    ],
)
def test_each_failure_is_named_with_a_hint_after_it_has_begun_and_before_the_end(name, last, hint):
    steps = curve(200, **last) + [SOUND | last] * 30
    spoke = first_alarm(steps, name)
    assert WINDOW <= spoke < len(steps)
    lines = alarms(recent(steps))
    assert hint in lines[name] and "\n" not in lines[name]
    assert spoke > 30  # not before anything has happened


def test_a_run_that_learns_raises_no_alarm_however_it_wobbles():
    good = {
        "rewards/format": 1.0,
        "rewards/accuracy": 0.95,
        "reward": 1.95,
        "kl": 0.2,
        "frac_reward_zero_std": 0.8,
    }
    steps = curve(300, **good, **{"completions/mean_length": 60.0})
    odd = SOUND | {
        "kl": 9.0,
        "completions/mean_length": 1.0,
        "completions/clipped_ratio": 1.0,
        "frac_reward_zero_std": 1.0,
    }
    steps[100] = steps[200] = odd  # one odd batch is no failure
    kl = [row | {"kl": min(row["kl"], 5.0)} for row in steps]
    assert all(not alarms(recent(kl[:i])) for i in range(len(kl)))


def test_steps_without_rewards_or_numbers_are_passed_over():
    assert alarms([{"loss": 1.0}] * 100) == {} == alarms([]) == alarms([SOUND] * (WINDOW - 1))
    assert set(alarms([SOUND | {"kl": None}] * 30)) == set()


def test_what_is_kept_of_a_long_run_is_all_that_the_rules_look_at():
    for last in ({"kl": 3.0}, {"completions/mean_length": 5.0}, {"rewards/format": 1.0}):
        steps = curve(400, **last)
        kept = []
        for row in steps:
            kept = recent([*kept, row])
        assert len(kept) == 2 * WINDOW + LONG and alarms(kept) == alarms(steps)
    assert len(LIMITS) + len(RULES) == 6


def test_a_run_that_blows_up_says_so_once_also_over_a_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    config = write_run(tmp_path, test_questions=[], learning_rate=0.03, steps=16, save_every=13)
    assert run(monkeypatch, config) == 0
    (tmp_path / "run" / "checkpoints" / "step-000016").rename(tmp_path / "gone")
    assert run(monkeypatch, config) == 0
    found = [
        row
        for row in rows(tmp_path / "run" / "incidents.jsonl")
        if row["says"].startswith("KL blow-up")
    ]
    assert len(found) == 1 and found[0]["kind"] == "watchdog" and found[0]["step"] >= WINDOW - 1
    assert "KL blow-up" in capsys.readouterr().out


def test_the_runs_that_come_along_as_pictures_raise_no_alarm():
    """The default run's own metrics, where it has been run here."""
    file = Path(__file__).parent.parent / "runs" / "miniature" / "metrics.jsonl"
    if not file.exists():
        pytest.skip("needs runs/miniature, which `make train` leaves")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(not alarms(recent(steps[:i])) for i in range(len(steps)))
