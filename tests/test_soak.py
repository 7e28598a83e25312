"""A run that is killed again and again ends as one that was left alone."""

from benchmarks.soak import soak


def test_three_kills_at_random_moments_change_no_byte_of_what_a_run_leaves(tmp_path) -> None:
    """20 kills: python -m benchmarks.soak."""
    assert soak(3, seed=1, folder=tmp_path) == []
