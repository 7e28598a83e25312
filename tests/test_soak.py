"""A run that is killed repeatedly ends like an uninterrupted one."""

from benchmarks.soak import soak


def test_three_kills_at_random_moments_change_no_byte_of_a_runs_output(tmp_path) -> None:
    """For 20 kills: python -m benchmarks.soak."""
    assert soak(3, seed=1, folder=tmp_path) == []
