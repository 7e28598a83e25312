"""The work around the steps: stopping, steps whose loss or gradient is not finite, out of memory,
missing images, validation, and saving checkpoints in the background.
"""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import rows, run, vowel_score, weights
from tiny_run import write_run

import train
import training.saving
from common.config import load_config
from common.errors import InputError
from grpo.optimizer import MasterAdamW
from grpo.sampler import Growing
from model import load_model
from rewards import Verdict
from training.checkpoint import Progress, damage_of
from training.incidents import main as incidents_program
from training.incidents import replay, write_incident
from training.prepare import prepared
from training.run import Run
from training.saving import Checkpoints


@pytest.fixture(autouse=True)
def something_to_learn(monkeypatch):
    monkeypatch.setattr("training.scoring.score", vowel_score)


def same_weights(a: Path, b: Path) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def press(number: int, name: str, call: int, monkeypatch) -> None:
    """Raise a signal at the `call`-th call of train.py's function `name`."""
    original, calls = getattr(train, name), []

    def pressing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, name, pressing)


@pytest.mark.parametrize(
    ("number", "name", "call", "updates", "done"),
    [
        # In the third step's update, which is abandoned and repeated.
        (signal.SIGINT, "completion_logprobs", 8, 1, 2),
        (signal.SIGTERM, "completion_logprobs", 7, 1, 2),
        (signal.SIGTERM, "sample_groups", 2, 1, 1),
        # After the second step's first update: the step is finished.
        (signal.SIGINT, "completion_logprobs", 11, 2, 2),
    ],
)
def test_a_stop_within_a_step_loses_no_finished_step_and_changes_no_byte(
    tmp_path, monkeypatch, capsys, in_docs, number, name, call, updates, done
):
    fields = dict(test_questions=[], inner_updates=updates, save_every=100, micro_batch_tokens=1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
        write_run(folder, **fields)
    assert run(monkeypatch, whole / "config.toml") == 0
    with monkeypatch.context() as patch:
        press(number, name, call, patch)
        assert run(patch, stopped / "config.toml") == 128 + number
    errors = capsys.readouterr().err
    assert f"resumes from {stopped}/run/checkpoints/step-{done:06d}" in errors.splitlines()[-1]
    in_docs("SIGTERM during an update", errors, stopped)
    assert [path.name for path in (stopped / "run" / "checkpoints").iterdir()] == [
        f"step-{done:06d}"
    ]
    assert run(monkeypatch, stopped / "config.toml") == 0
    assert same_weights(whole, stopped)
    assert [row["step"] for row in rows(stopped / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    for file in ("metrics.jsonl", "completions.jsonl"):
        assert [untimed(row) for row in rows(whole / "run" / file)] == [
            untimed(r) for r in rows(stopped / "run" / file)
        ]


def test_a_stop_within_a_rollout_is_obeyed_at_the_next_token(tmp_path, monkeypatch):
    original, tokens = Growing.advance, []

    def pressing(*args):
        tokens.append(1)
        if len(tokens) == 2:
            signal.raise_signal(signal.SIGTERM)
        original(*args)

    monkeypatch.setattr(Growing, "advance", pressing)
    assert run(monkeypatch, write_run(tmp_path, test_questions=[])) == 143
    assert len(tokens) == 2


def untimed(row: dict) -> dict:
    return {
        name: value for name, value in row.items() if not name.startswith(("seconds", "tokens_per"))
    }


def score_that_fails(*steps: int):
    """A rule that returns NaN for all 12 completions of these steps."""
    calls = []

    def score(completion, answer):
        calls.append(1)
        verdicts = vowel_score(completion, answer)
        bad = (len(calls) - 1) // 12 in steps
        return (Verdict("format", float("nan"), "broken"), *verdicts[1:]) if bad else verdicts

    return score


def test_a_step_that_is_not_finite_changes_no_weight_and_can_be_replayed(
    tmp_path, monkeypatch, capsys, in_docs
):
    config = write_run(tmp_path, test_questions=[], save_every=1, keep_checkpoints=9)
    monkeypatch.setattr("training.scoring.score", score_that_fails(1, 2))
    assert run(monkeypatch, config) == 0
    saved = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-00000{i}" / "model.safetensors")
        for i in (1, 3, 4)
    ]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    assert any(not torch.equal(value, saved[2][name]) for name, value in saved[0].items())
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["loss"] is None for row in metrics] == [False, True, True, False]
    kept = tmp_path / "run" / "incidents"
    assert [row["kind"] for row in rows(tmp_path / "run" / "incidents.jsonl")] == ["not finite"] * 2
    printed = capsys.readouterr().out
    assert "2 of kind 'not finite'" in printed
    in_docs("a loss or gradient that is not finite", printed)

    # The incident folder is all it takes: images and base model are deleted.
    shutil.rmtree(tmp_path / "questions"), shutil.rmtree(tmp_path / "base")
    for step in ("step-000001", "step-000002"):
        assert damage_of(kept / step) == ""
        lines = replay(kept / step)
        assert any("advantages_NG has 12 values that are not finite" in line for line in lines)
        assert sum("gradient not finite" in line for line in lines) == 3
    monkeypatch.setattr("sys.argv", ["incidents", str(tmp_path)])
    assert (
        incidents_program() == 2 and "give a folder runs/NAME/incidents" in capsys.readouterr().err
    )


def test_a_replayed_incident_has_the_same_loss_and_gradient(tmp_path, monkeypatch):
    """For comparison, the step is a good one that is saved as an incident."""
    original = Run._end

    def written(run, step):
        write_incident(run.config, step, load_model(tmp_path / "base"))
        original(run, step)

    monkeypatch.setattr(Run, "_end", written)
    # A ratio whose loss is not near 0 where it is 1: the incident must be replayed with the knobs.
    config = write_run(tmp_path, test_questions=[], steps=1, ratio="detached")
    assert run(monkeypatch, config) == 0
    lines = replay(tmp_path / "run" / "incidents" / "step-000000")
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[1:]]
    assert sum(losses) / 3 == pytest.approx(row["loss"], abs=2e-3)
    assert len(lines) == 4 and all("gradient finite" in line for line in lines[1:])
    lowest = load_file(tmp_path / "run" / "incidents" / "step-000000" / "batch.safetensors")[
        "logp_NGT"
    ].min()
    assert min(
        float(line.split("log-probability ")[1].split(",")[0]) for line in lines[1:]
    ) == pytest.approx(float(lowest), rel=1e-2)


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run_with_a_line_and_a_checkpoint(
    tmp_path, monkeypatch, capsys, in_docs, method
):
    config = write_run(tmp_path, test_questions=[], max_bad_steps=2, save_every=100, method=method)
    monkeypatch.setattr("training.scoring.score", score_that_fails(1, 2, 3))
    if method == "sft":
        nan = torch.tensor(float("nan"))
        monkeypatch.setattr("training.sft.accumulate_cross_entropy", lambda *_: (nan, nan))
    assert run(monkeypatch, config) == 2
    in_docs("max_bad_steps such steps in a row", capsys.readouterr().err.splitlines()[-1])
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (
        saved.name == ("step-000003" if method == "grpo" else "step-000002")
        and damage_of(saved) == ""
    )


def short_of_memory(groups: int, monkeypatch, after_backward: bool = False) -> None:
    """Simulate a GPU that runs out of memory with more than so many groups, in the forward pass or
    in the backward pass.
    """
    original = train.completion_logprobs

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def limited(model, batch, *rest):
        logp, entropy = original(model, batch, *rest)
        if len(batch.prompts.lengths_N) > groups:
            if not after_backward:
                raise torch.OutOfMemoryError("CUDA out of memory")
            logp = Failing.apply(logp)
        return logp, entropy

    monkeypatch.setattr(train, "completion_logprobs", limited)
    reference = limited if not after_backward else original
    monkeypatch.setattr("training.run.completion_logprobs", reference)


@pytest.mark.parametrize("after_backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_that_is_full_gets_smaller_micro_batches_and_the_same_gradient(
    tmp_path, monkeypatch, capsys, in_docs, after_backward, dtype
):
    folders = []
    for size, limited in ((1, False), (100_000, True)):
        (folder := tmp_path / str(size)).mkdir()
        # The reference has no backward pass, and would be the first to use the large micro-batches.
        beta = 0.0 if after_backward else 0.04
        fields = dict(micro_batch_tokens=size, prompts_per_step=4, dtype=dtype, beta=beta)
        config = write_run(folder, test_questions=[], **fields)
        with monkeypatch.context() as patch:
            if limited:
                short_of_memory(1, patch, after_backward)
            assert run(patch, config) == 0
        folders.append(folder)
    assert same_weights(*folders)
    in_docs("a full GPU (the gradient stays the same)", capsys.readouterr().out)
    lines = [
        row["says"]
        for row in rows(folders[1] / "run" / "incidents.jsonl")
        if row["kind"] == "memory"
    ]
    assert len(lines) in (1, 2) and all(
        "out of memory with micro_batch_tokens" in line for line in lines
    )


def test_a_group_that_does_not_fit_alone_is_one_line_and_loses_nothing(
    tmp_path, monkeypatch, capsys, in_docs
):
    config = write_run(tmp_path, test_questions=[], save_every=1, steps=2)
    assert run(monkeypatch, config, "--steps", "2") == 0
    short_of_memory(0, monkeypatch)
    (other := tmp_path / "other").mkdir()
    assert run(monkeypatch, write_run(other, test_questions=[])) == 2
    in_docs("a GPU too small for one group", capsys.readouterr().err.splitlines()[-1])


def test_missing_images_are_skipped_and_logged_if_the_config_says_so(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ends = []
    for folder, stop in ((whole, False), (broken, True)):
        folder.mkdir()
        config = write_run(
            folder, test_questions=[], bad_images="skip", prompts_per_step=2, save_every=1
        )
        (folder / "questions" / "0.png").unlink()
        os.truncate(folder / "questions" / "1.png", 300)
        with monkeypatch.context() as patch:
            if stop:
                press(signal.SIGTERM, "sample_groups", 2, patch)
            assert run(patch, config) == (143 if stop else 0)
        if stop:
            (folder / "questions" / "2.png").write_text("damaged while the run was stopped")
            shutil.copy(whole / "questions" / "2.png", folder / "questions" / "2.png")
            assert run(monkeypatch, config) == 0
        incidents = rows(folder / "run" / "incidents.jsonl")
        assert {row["kind"] for row in incidents} == {"image"}
        assert sorted(row["says"].split("questions/")[1].split(":")[0] for row in incidents) == [
            "0.png",
            "1.png",
        ]
        assert [row["step"] for row in rows(folder / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
        ends.append(folder)
    assert same_weights(*ends)
    assert "because their images can't be read: 1, first" in capsys.readouterr().out


def test_a_step_without_a_readable_image_counts_but_trains_nothing(tmp_path, monkeypatch):
    config = write_run(
        tmp_path, test_questions=[], bad_images="skip", prompts_per_step=1, steps=8, train_count=8
    )
    for i in range(7):
        os.truncate(tmp_path / "questions" / f"{i}.png", 300)
    assert run(monkeypatch, config) == 0
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(8)) and sum(
        "reward" in row for row in metrics
    ) == 1
    assert run(monkeypatch, write_and_break_all(tmp_path / "all")) == 2


def write_and_break_all(folder: Path) -> Path:
    folder.mkdir()
    config = write_run(folder, test_questions=[], bad_images="skip")
    for i in range(8):
        (folder / "questions" / f"{i}.png").unlink()
    return config


def test_validation_keeps_the_best_checkpoint_and_is_not_repeated_when_the_run_is_resumed(
    tmp_path, monkeypatch, capsys
):
    # Of the two equally good checkpoints, the first is kept.
    answers = iter(f"<answer>{letter}</answer>" for letter in "ABBA")

    def greedy(run, questions, label):
        return [next(answers)] * len(questions) if label == "validation" else [""] * len(questions)

    monkeypatch.setattr(Run, "answers", greedy)
    config = write_run(
        tmp_path, validation_fraction=0.25, validate_every=1, keep_checkpoints=1, save_every=100
    )
    with monkeypatch.context() as patch:
        press(signal.SIGINT, "sample_groups", 4, patch)
        assert run(patch, config) == 130
    assert run(monkeypatch, config) == 0
    validations = rows(tmp_path / "run" / "validation.jsonl")
    assert [(row["step"], row["right"], row["total"]) for row in validations] == [
        (0, 0, 2),
        (1, 2, 2),
        (2, 2, 2),
        (3, 0, 2),
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["validation"] == {
        "step": 2,
        "right": 2,
        "total": 2,
    }
    output = capsys.readouterr().out
    assert (
        "100.0 (34.2 to 100.0) percent of 2" in output
        and "step-000002" in output
        and "2 for validation" in output
    )


def test_questions_to_validate_on_share_no_image_with_the_others(
    tmp_path, monkeypatch, capsys, in_docs
):
    train_file, test_file = (
        str(tmp_path / "questions" / f"{name}.json") for name in ("train", "test")
    )
    config = write_run(tmp_path, validation_questions=[test_file])
    assert run(monkeypatch, config) == 2
    in_docs("an image in both the validation and the test set", capsys.readouterr().err)
    assert run(monkeypatch, config, "--validation_questions", train_file) == 2
    assert "trained on too" in capsys.readouterr().err
    assert run(monkeypatch, config, "--test_questions", "--train_questions", test_file) == 2
    assert "trained on too" in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["plenty", "none"])
def test_a_checkpoint_has_the_weights_at_the_time_of_saving_although_training_continues(
    tmp_path, monkeypatch, memory
):
    if memory == "none":
        monkeypatch.setattr(training.saving, "available_memory", lambda: 0)
    config = load_config(write_run(tmp_path, dtype="bfloat16"))
    with prepared(config) as made:
        expected = [parameter.detach().clone() for parameter in made.policy.parameters()]
        made.progress.step = 1
        path = made.checkpoints.save(made.policy, made.optimizer, made.progress)
        with torch.no_grad():
            for tensor in (*made.policy.parameters(), *made.optimizer.masters):
                tensor.fill_(7.0)
        made.progress.tokens = 7
        made.checkpoints.finish()
    assert damage_of(path) == ""
    with prepared(config) as again:
        kept = list(again.policy.parameters())
        assert all(torch.equal(a, b) for a, b in zip(expected, kept, strict=True))
        assert (again.progress.step, again.progress.tokens) == (1, 0)


def test_a_background_save_that_fails_is_reported_and_keeps_the_previous_checkpoint(
    tmp_path, monkeypatch, in_docs
):
    config = load_config(write_run(tmp_path))
    model = load_model(config.model)
    saving = Checkpoints(config, ThreadPoolExecutor(1))
    optimizer = MasterAdamW(model, config)
    before = saving.save(model, optimizer, Progress(step=1))
    saving.finish()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.saving.write_tensors", full)
    saving.save(model, optimizer, Progress(step=2))
    with pytest.raises(
        InputError,
        match="step-000002: can't save .* No space left on device.* resumes from .*step-000001",
    ) as caught:
        saving.finish()
    in_docs("a disk that fails while training goes on", str(caught.value))
    assert damage_of(before) == "" and [path.name for path in before.parent.iterdir()] == [
        "step-000001"
    ]


def test_a_run_moved_with_its_model_and_questions_resumes_unchanged(tmp_path, monkeypatch):
    whole, moved = tmp_path / "whole", tmp_path / "elsewhere" / "moved"
    for folder in (whole, tmp_path / "first"):
        folder.mkdir()
        write_run(folder, test_questions=[])
    assert run(monkeypatch, whole / "config.toml") == 0
    with monkeypatch.context() as patch:
        press(signal.SIGTERM, "sample_groups", 3, patch)
        assert run(patch, tmp_path / "first" / "config.toml") == 143
    moved.parent.mkdir()
    (tmp_path / "first").rename(moved)
    config = moved / "config.toml"
    config.write_text(config.read_text().replace(str(tmp_path / "first"), str(moved)))
    assert run(monkeypatch, config) == 0
    assert same_weights(whole, moved) and len(rows(moved / "run" / "metrics.jsonl")) == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys, in_docs):
    config = write_run(
        tmp_path, test_questions=[], save_every=1, learning_rate=1e38, beta=0.0, max_grad_norm=1e30
    )
    assert run(monkeypatch, config) == 2
    in_docs("weights that have become infinite or NaN", capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "checkpoints").iterdir()
    )
