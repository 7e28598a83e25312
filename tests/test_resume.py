"""Resuming a run: after signals and failures at awkward moments, and from a run folder that has
changed.
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_session import press, same_weights, untimed
from test_train import ROOT, rows, run, vowel_score
from tiny_run import write_run

import train
from common.errors import InputError
from training.checkpoint import checkpoints, damage_of
from training.incidents import MOST
from training.log import RunLog
from training.run import Run
from training.saving import Checkpoints


@pytest.fixture(autouse=True)
def something_to_learn(monkeypatch):
    monkeypatch.setattr("training.scoring.score", vowel_score)


def two_runs(folder: Path, monkeypatch, **fields: object) -> tuple[Path, Path]:
    """A finished run, and an identical one that has not started."""
    for name in ("whole", "broken"):
        (folder / name).mkdir()
        write_run(folder / name, **{"test_questions": [], **fields})
    assert run(monkeypatch, folder / "whole" / "config.toml") == 0
    return folder / "whole", folder / "broken"


def same_records(a: Path, b: Path) -> bool:
    return all(
        [untimed(row) for row in rows(a / "run" / name)]
        == [untimed(row) for row in rows(b / "run" / name)]
        for name in ("metrics.jsonl", "completions.jsonl", "validation.jsonl")
    )


@pytest.mark.parametrize("presses", [1, 2])
def test_a_validation_that_was_stopped_is_done_when_the_run_is_resumed(
    tmp_path, monkeypatch, capsys, in_docs, presses
):
    """The first signal stops the run at the next token, the second one at once."""
    fields = dict(validation_fraction=0.25, validate_every=2, save_every=100)
    whole, broken = two_runs(tmp_path, monkeypatch, **fields)
    with monkeypatch.context() as patch:
        greedy, finished = Run.answers, []

        def pressed(run, questions, label):
            if label == "validation":
                for _ in range(presses):
                    signal.raise_signal(signal.SIGTERM)
            texts = greedy(run, questions, label)
            finished.append(label)
            return texts

        patch.setattr(Run, "answers", pressed)
        assert run(patch, broken / "config.toml") == 143
        assert finished == ["accuracy before"]
    if presses == 1:
        row = "SIGTERM during validation (repeated on resuming)"
        in_docs(row, capsys.readouterr().err, broken)
    assert [path.name for path in checkpoints(broken / "run")] == ["step-000002"]
    assert run(monkeypatch, broken / "config.toml") == 0
    assert same_weights(whole, broken) and same_records(whole, broken)
    assert len(rows(broken / "run" / "validation.jsonl")) == 2


def test_a_bug_keeps_its_traceback_and_loses_no_finished_step(tmp_path, monkeypatch):
    config = write_run(tmp_path, test_questions=[], save_every=100)
    sample, calls = train.sample_groups, []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a bug of ours")
        return sample(*args, **kwargs)

    monkeypatch.setattr(train, "sample_groups", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run(monkeypatch, config)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000002"]


def test_a_disk_too_small_for_the_run_is_reported_before_it_starts(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, test_questions=[], steps=1)
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: small)
    for flags in (["--dry-run"], []):
        assert run(monkeypatch, config, *flags) == 0
        output = capsys.readouterr().out
        assert "only 0.0 GB is available: lower keep_checkpoints" in output


def test_a_disk_that_failed_once_does_not_cost_the_next_checkpoint(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, test_questions=[], save_every=2)
    write, failed = Checkpoints._write, []

    def failing(saving, final, *rest):
        if not failed:
            failed.append(1)
            raise InputError("the disk is full")
        write(saving, final, *rest)

    monkeypatch.setattr(Checkpoints, "_write", failing)
    press(signal.SIGTERM, "sample_groups", 4, monkeypatch)
    assert run(monkeypatch, config) == 143
    errors = capsys.readouterr().err.splitlines()
    assert "the disk is full" in errors and errors[-1].endswith("step-000003")
    assert damage_of(tmp_path / "run" / "checkpoints" / "step-000003") == ""


def test_a_log_that_fails_after_an_update_saves_no_partly_counted_step(
    tmp_path, monkeypatch, capsys
):
    whole, broken = two_runs(tmp_path, monkeypatch, save_every=2)
    record = RunLog.step

    def full(log, step):
        if step.number == 3:
            raise OSError(28, "No space left on device")
        record(log, step)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", full)
        assert run(patch, broken / "config.toml") == 2
    assert f"{broken}/run: No space left on device" in capsys.readouterr().err
    assert [path.name for path in checkpoints(broken / "run")] == ["step-000002"]
    assert run(monkeypatch, broken / "config.toml") == 0
    assert same_weights(whole, broken) and same_records(whole, broken)


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run_and_no_step_is_repeated(
    tmp_path, monkeypatch
):
    config = write_run(tmp_path, test_questions=[])
    finish, calls = Checkpoints.finish, []

    def pressed(saving):
        calls.append((tmp_path / "run" / "metrics.jsonl").read_text().count("\n"))
        if calls[-2:] == [4, 4]:  # once before the last one starts, once to wait for it
            signal.raise_signal(signal.SIGTERM)
        finish(saving)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "finish", pressed)
        assert run(patch, config) == 143
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "run" / "model").exists()
    assert run(monkeypatch, config) == 0
    assert (
        metrics == (tmp_path / "run" / "metrics.jsonl").read_bytes()
        and (tmp_path / "run" / "model").is_dir()
    )


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    config = write_run(tmp_path, test_questions=[], steps=6, save_every=100)
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(config)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (
        len(rows(tmp_path / "run" / "metrics.jsonl")) == 6 and (tmp_path / "run" / "model").is_dir()
    )


@pytest.mark.parametrize("loss", ["gone", "a link to nowhere"])
def test_records_are_not_overwritten_when_the_checkpoints_are_away(
    tmp_path, monkeypatch, capsys, in_docs, loss
):
    config = write_run(tmp_path, test_questions=[], save_every=1)
    press(signal.SIGTERM, "sample_groups", 4, monkeypatch)
    assert run(monkeypatch, config) == 143
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "away")
    if loss != "gone":
        (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "not mounted")
    assert run(monkeypatch, config) == 2
    errors = capsys.readouterr().err
    assert "has records of 3 steps but no checkpoint" in errors
    in_docs("all checkpoints are missing (for example, a disk is not mounted)", errors)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_copied_to_another_name_is_not_resumed_from(tmp_path, monkeypatch):
    config = write_run(tmp_path, test_questions=[], save_every=1)
    press(signal.SIGTERM, "sample_groups", 4, monkeypatch)
    assert run(monkeypatch, config) == 143
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-best")
    (folder / "x.partial").write_text("a stray file does no harm")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000002", "step-000003"]
    (folder / "step-000003.partial").mkdir()  # as a killed process leaves it
    assert run(monkeypatch, config) == 0 and (folder / "step-best").is_dir()
    assert not (folder / "step-000003.partial").exists()


def test_step_numbers_with_more_than_six_digits_are_sorted_by_value(tmp_path):
    for step in (999_999, 1_000_000, 2):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-000002",
        "step-999999",
        "step-1000000",
    ]


def test_running_out_of_memory_after_some_micro_batches_discards_their_gradients(
    tmp_path, monkeypatch
):
    """Otherwise the gradients of the first micro-batches would count twice."""
    norms = []
    for size, failing in ((390, False), (781, True)):  # one group at a time; two
        (folder := tmp_path / str(size)).mkdir()
        config = write_run(
            folder, test_questions=[], micro_batch_tokens=size, prompts_per_step=4, beta=0.0
        )
        calls: list[int] = []
        with monkeypatch.context() as patch:
            second = out_of_memory_at_the_second(calls, failing)
            patch.setattr(train, "completion_logprobs", second)
            assert run(patch, config) == 0
        assert calls[0] == (2 if failing else 1)
        norms.append(rows(folder / "run" / "metrics.jsonl")[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def out_of_memory_at_the_second(calls: list[int], failing: bool):
    """A `completion_logprobs` that records the groups of each call, and may fail in the second."""
    original = train.completion_logprobs

    def logprobs(model, batch, *rest):
        calls.append(len(batch.prompts.lengths_N))
        if failing and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch, *rest)

    return logprobs


def test_a_first_update_that_is_not_finite_is_not_hidden_by_a_good_second_one(
    tmp_path, monkeypatch
):
    config = write_run(tmp_path, test_questions=[], inner_updates=2, steps=2)
    original, calls = train.accumulate_gradient, []

    def first_is_bad(*args):
        calls.append(1)
        stats = original(*args)
        return stats | {"loss": stats["loss"] * float("nan")} if len(calls) == 1 else stats

    monkeypatch.setattr(train, "accumulate_gradient", first_is_bad)
    assert run(monkeypatch, config) == 0
    assert len(calls) == 3 and [
        row["loss"] is None for row in rows(tmp_path / "run" / "metrics.jsonl")
    ] == [True, False]
    assert (tmp_path / "run" / "incidents" / "step-000000" / "model").is_dir()


def test_repeated_incidents_do_not_fill_the_disk(tmp_path, monkeypatch):
    config = write_run(tmp_path, test_questions=[], steps=14, max_bad_steps=100)
    monkeypatch.setattr(Run, "_end", spoil_before(Run._end))
    assert run(monkeypatch, config) == 0
    assert len(rows(tmp_path / "run" / "incidents.jsonl")) >= 14
    assert len(list((tmp_path / "run" / "incidents").iterdir())) == MOST


def spoil_before(end):
    """A replacement for `Run._end` that marks the step as not finite."""

    def ending(run, step):
        step.finite = False
        end(run, step)

    return ending
