"""The letter parser against plain scoring, on the completions of a published model."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from rewards import LETTERS, accuracy_reward, read_letter

REAL = Path(__file__).parents[2] / "shared" / "radiology" / "completions.jsonl"
MODEL = "JZPeterPan/MedVLM-R1"
LOOKED_FOR = re.compile(r"<answer>\s*([A-J])\s*</answer>")


def plainly_read(completion: str) -> str | None:
    """The letter that a scorer with one obvious pattern finds."""
    found = LOOKED_FOR.search(completion)
    return found[1] if found else None


def agreement(pairs):
    """(ground truth, completion) pairs -> counts of (plain right, ours right, reward) and of
    (plain, our letter).
    """
    scores, letters = Counter(), Counter()
    for right, completion in pairs:
        plain, ours = plainly_read(completion), read_letter(completion)
        scores[plain == right, ours == right, accuracy_reward(completion, right)] += 1
        letters[plain, ours] += 1
    return scores, letters


def test_agreement_counts_the_differences_between_the_two_readers():
    scores, letters = agreement(
        [("B", "<answer>B</answer>"), ("B", "<answer>B) mass</answer>"), ("A", "B"), ("A", "")]
    )
    assert scores == {(True, True, 1.0): 1, (False, True, 0.5): 1, (False, False, 0.0): 2}
    assert letters == {("B", "B"): 1, (None, "B"): 2, (None, None): 1}


def test_the_parser_scores_real_completions_as_the_obvious_pattern_does():
    if not REAL.exists():
        pytest.skip(f"{REAL.name} of a published model is not here")
    with REAL.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = [
        (row["ground_truth"], row["completion"])
        for row in rows
        if row["model"].startswith(MODEL)
        and isinstance(row["ground_truth"], str)
        and row["ground_truth"] in LETTERS
    ]
    scores, letters = agreement(pairs)
    print(f"(plain right, ours right, reward): {dict(scores)}; (plain, ours): {dict(letters)}")
    assert len(pairs) > 500 and {plain for plain, _ in letters} >= set("ABCD")
    assert all(plain == ours for plain, ours in letters)
    assert set(scores) == {(True, True, 1.0), (False, False, 0.0)}
