"""train.py from end to end on a tiny model: its output, resuming, stopping and error messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import tiny_model, write_run

import train
from common.config import load_config
from data.choice import load_questions
from model import save_model
from rewards import Verdict
from training.run import Run

ROOT = Path(__file__).parent.parent


def vowel_score(completion: str, answer: str) -> tuple[Verdict, ...]:
    """A rule that even a random model can satisfy. The real rules would always score it 0, so that
    nothing would be learned.
    """
    share = sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
    return Verdict("format", share, "vowels"), Verdict("accuracy", float("e" in completion), "an e")


def run(monkeypatch, config: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *flags])
    return train.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run. Tests only read it, or work on a copy."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, config) == 0
    return folder


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def test_a_run_writes_metrics_completions_checkpoints_model_and_summary(finished):
    metrics = rows(finished / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert {
        "reward",
        "rewards/format",
        "rewards/accuracy",
        "kl",
        "entropy",
        "grad_norm",
        "tokens_per_second",
    } <= metrics[0].keys()
    assert all(row["sampler_gap"] < 1e-4 for row in metrics)
    completions = rows(finished / "run" / "completions.jsonl")
    assert len(completions) == 4 * 3 * 4
    assert completions[0]["rewards"]["accuracy"].keys() == {"score", "why"}
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["questions"] == {"MRI": 8, "X-ray": 4} and summary["steps"] == 4
    assert summary["before"].keys() == summary["after"].keys() == {"MRI", "X-ray"}
    assert sorted(p.name for p in (finished / "run" / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
    ]
    assert list((finished / "run" / "tensorboard").glob("events*"))


def test_the_trained_model_loads_in_transformers_with_its_tokenizer(finished):
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        finished / "run" / "model", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(finished / "run" / "model")
    assert tokenizer.decode(tokenizer("<think>mass</think>").input_ids) == "<think>mass</think>"
    assert model.config.text_config.vocab_size == 340


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bytes_as_an_uninterrupted_one(
    tmp_path, monkeypatch, dtype
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    monkeypatch.setattr("training.scoring.score", vowel_score)
    fields = dict(dtype=dtype, test_questions=[], inner_updates=2, learning_rate=1e-2)
    assert run(monkeypatch, write_run(whole, **fields)) == 0
    config = write_run(broken, **fields)
    with monkeypatch.context() as patch:
        step, calls = train.sample_groups, []

        def cut_off(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:  # in the fourth step, one step after the checkpoint
                # An Exception would be caught, and the last step saved.
                raise SystemExit("power cut")
            return step(*args, **kwargs)

        patch.setattr(train, "sample_groups", cut_off)
        with pytest.raises(SystemExit, match="power cut"):
            run(patch, config)
    assert [row["step"] for row in rows(broken / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert run(monkeypatch, config) == 0
    assert [row["step"] for row in rows(broken / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert len(rows(broken / "run" / "completions.jsonl")) == 4 * 3 * 4
    expected = weights(whole)
    assert any(
        not torch.equal(
            value, load_file(whole / "base" / "model.safetensors")[name].to(value.dtype)
        )
        for name, value in expected.items()
    )
    assert all(torch.equal(value, expected[name]) for name, value in weights(broken).items())
    assert [row["reward"] for row in rows(whole / "run" / "metrics.jsonl")] == [
        row["reward"] for row in rows(broken / "run" / "metrics.jsonl")
    ]


def test_micro_batch_size_does_not_change_what_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    results = []
    for size in (1, 100_000):
        (folder := tmp_path / str(size)).mkdir()
        assert (
            run(monkeypatch, write_run(folder, micro_batch_tokens=size, test_questions=[], steps=1))
            == 0
        )
        results.append(rows(folder / "run" / "metrics.jsonl")[0])
    assert results[0]["grad_norm"] > 0
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_frozen_vision_tower_does_not_change_while_the_rest_learns_and_resumes(
    tmp_path, monkeypatch, method
):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    fields = dict(
        freeze_vision=True, method=method, test_questions=[], steps=3, save_every=1, train_count=5
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        write_run(folder, **fields)
    assert run(monkeypatch, whole / "config.toml") == 0
    base, trained = (
        load_file(whole / name / "model.safetensors") for name in ("base", "run/model")
    )
    changed = {name for name, value in trained.items() if not torch.equal(value, base[name])}
    assert changed and not any(name.startswith("visual.") for name in changed)
    assert "seconds/vision" in rows(whole / "run" / "metrics.jsonl")[0] or method == "sft"

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_end", stop_after(2))
        assert run(patch, broken / "config.toml") == 130
    assert run(monkeypatch, broken / "config.toml") == 0
    resumed = load_file(broken / "run" / "model" / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in trained.items())


def stop_after(steps: int):
    """A replacement for `Run._end` that presses Ctrl-C in the last of so many steps."""
    original = Run._end

    def ending(run, step):
        if step.number + 1 == steps:
            signal.raise_signal(signal.SIGINT)
        original(run, step)

    return ending


def test_recomputed_activations_do_not_change_what_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    trained = []
    for recompute in (False, True):
        (folder := tmp_path / str(recompute)).mkdir()
        assert (
            run(
                monkeypatch,
                write_run(folder, activation_checkpointing=recompute, test_questions=[], steps=2),
            )
            == 0
        )
        trained.append(load_file(folder / "run" / "model" / "model.safetensors"))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_the_time_of_a_step_is_recorded_by_phase(finished):
    for row in rows(finished / "run" / "metrics.jsonl"):
        phases = {
            name.removeprefix("seconds/"): row[name] for name in row if name.startswith("seconds/")
        }
        assert phases.keys() == {
            "prompts",
            "rollout",
            "rewards",
            "reference",
            "old policy",
            "update",
            "optimizer",
        }
        assert sum(phases.values()) == pytest.approx(row["seconds"]) and min(phases.values()) >= 0


def test_a_run_shows_a_progress_bar_and_logs_samples_to_tensorboard(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, test_questions=[], log_samples_every=2)
    assert run(monkeypatch, config) == 0
    assert "GRPO: 100%" in capsys.readouterr().err
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    samples = board.Tensors("samples/text_summary")
    assert [event.step for event in samples] == [0, 2]
    first = rows(tmp_path / "run" / "completions.jsonl")[0]["completion"]
    assert first.replace("\n", "\n    ") in samples[0].tensor_proto.string_val[0].decode()
    assert [event.step for event in board.Images("samples")] == [0, 2]


def test_an_image_damaged_during_the_run_ends_it_with_one_line_and_no_hanging_thread(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    config = write_run(tmp_path, test_questions=[])
    monkeypatch.setattr(
        train, "grpo_step", lambda *args: break_images(tmp_path) or grpo_step(*args)
    )
    before = threading.active_count()
    assert run(monkeypatch, config) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("train.py: ") and ".png" in line
    assert threading.active_count() == before


grpo_step = train.grpo_step


def break_images(folder: Path) -> None:
    """Truncate every image file after its first bytes."""
    for file in (folder / "questions").glob("*.png"):
        file.write_bytes(file.read_bytes()[:60])


def test_ctrl_c_saves_a_checkpoint_that_the_same_command_resumes_from(tmp_path, monkeypatch):
    config = write_run(tmp_path, steps=100000, test_questions=[], save_every=100000)
    command = [sys.executable, "train.py", "--config", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (
        not (metrics.exists() and metrics.read_text().count("\n") >= 2)
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "the same command resumes from" in errors.splitlines()[-1]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    done = json.loads((saved / "progress.json").read_text())["step"]
    assert done == len(rows(metrics)) >= 2


def test_a_finished_run_is_not_trained_further_and_another_config_is_refused(
    finished, monkeypatch, capsys
):
    before = (finished / "run" / "metrics.jsonl").read_bytes()
    assert run(monkeypatch, finished / "config.toml") == 0
    assert (
        run(monkeypatch, finished / "config.toml", "--micro_batch_tokens", "1") == 0
    )  # changes nothing but memory
    assert (finished / "run" / "metrics.jsonl").read_bytes() == before
    assert run(monkeypatch, finished / "config.toml", "--beta", "0.1") == 2
    assert "different values of beta (was 0.04, now 0.1)" in capsys.readouterr().err


def test_a_finished_run_whose_checkpoints_were_deleted_is_not_overwritten(
    tmp_path, monkeypatch, capsys, in_docs
):
    config = write_run(tmp_path, steps=1)
    assert run(monkeypatch, config) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert run(monkeypatch, config, "--seed", "5") == 2
    in_docs("the checkpoints of a finished run were deleted", capsys.readouterr().err)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model


DAMAGE = {
    "a truncated file": lambda step: os.truncate(step / "optimizer.safetensors", 100),
    "one bit": lambda step: flip(step / "model.safetensors"),
    "a missing file": lambda step: (step / "progress.json").unlink(),
    "no manifest": lambda step: (step / "manifest.json").unlink(),
    "an invalid manifest": lambda step: (step / "manifest.json").write_text("[1, 2"),
}


def flip(file: Path) -> None:
    """Flip the lowest bit of a byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    finished, tmp_path, monkeypatch, capsys, damage
):
    """The run resumes from step 2 of 4, and its model has the same bytes as before."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy" / "run"
    text = (finished / "config.toml").read_text().replace(str(finished), str(tmp_path / "copy"))
    (tmp_path / "copy" / "config.toml").write_text(text)
    resolved = (folder / "config.toml").read_text().replace(str(finished), str(tmp_path / "copy"))
    (folder / "config.toml").write_text(resolved)
    before = (folder / "model" / "model.safetensors").read_bytes()
    damage(folder / "checkpoints" / "step-000004")
    assert run(monkeypatch, tmp_path / "copy" / "config.toml") == 0
    output = capsys.readouterr()
    assert (
        "step-000004 is damaged" in output.err
        and "resuming from" in output.out
        and "step-000002" in output.out
    )
    assert (folder / "model" / "model.safetensors").read_bytes() == before

    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
        "step-000004.damaged",
    ]

    for step in ("step-000002", "step-000004"):
        damage(folder / "checkpoints" / step)
    assert run(monkeypatch, tmp_path / "copy" / "config.toml") == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err
    assert (folder / "model" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_is_flushed_to_disk_before_it_gets_its_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    happened, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: happened.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd)
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b: happened.append((str(a), str(b))) or replace(a, b)
    )
    assert run(monkeypatch, write_run(tmp_path, test_questions=[], steps=1)) == 0
    final = str(tmp_path / "run" / "checkpoints" / "step-000001")
    renamed = happened.index((f"{final}.partial", final))
    flushed = set(happened[:renamed])
    assert {f"{final}.partial/{file.name}" for file in Path(final).iterdir()} | {
        f"{final}.partial"
    } <= flushed
    assert str(Path(final).parent) in happened[renamed:]


def test_a_second_process_on_the_same_folder_is_refused_and_changes_nothing(
    finished, monkeypatch, capsys, in_docs
):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()",
            str(finished / "run" / "lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    before = {file: file.read_bytes() for file in (finished / "run").rglob("*") if file.is_file()}
    assert run(monkeypatch, finished / "config.toml") == 2
    in_docs("a second process in the same run folder", capsys.readouterr().err, finished)
    assert before == {
        file: file.read_bytes() for file in (finished / "run").rglob("*") if file.is_file()
    }
    holder.communicate()  # however a process ends, it releases its lock
    assert run(monkeypatch, finished / "config.toml") == 0


def test_a_log_truncated_by_a_crash_is_repaired_on_resume(tmp_path, monkeypatch):
    config = write_run(tmp_path, test_questions=[])
    assert run(monkeypatch, config) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole[:-40] + "\0" * 30)
    assert run(monkeypatch, config) == 0
    assert [row["step"] for row in rows(metrics)] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows(metrics)] == [
        json.loads(line)["loss"] for line in whole.splitlines()
    ]


def test_held_out_questions_share_no_image_with_those_trained_on(tmp_path, monkeypatch):
    config = load_config(write_run(tmp_path), {"test_questions": (), "test_fraction": 0.5})
    questions = load_questions(config)
    assert len(questions.train) == len(questions.test) == 4
    trained_on = {question.images for question in questions.train}
    assert not trained_on & {question.images for question in questions.test}


def test_an_image_in_both_training_and_test_data_is_refused(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)
    assert (
        run(monkeypatch, config, "--test_questions", str(tmp_path / "questions" / "train.json"))
        == 2
    )
    assert "trained on too" in capsys.readouterr().err


def test_a_diverged_model_ends_the_run_with_one_line_instead_of_sampling_random_tokens(
    tmp_path, monkeypatch, capsys
):
    config = write_run(tmp_path, test_questions=[])
    broken = tiny_model()
    broken.layers[1].down.weight.data[3, 3] = float("nan")
    save_model(broken, tmp_path / "base")
    assert run(monkeypatch, config) == 2
    assert "not finite" in capsys.readouterr().err


BAD_INPUTS = {
    "no such config": (lambda f: (f / "config.toml").unlink(), "can't read the config"),
    "unknown key": (lambda f: (f / "config.toml").open("a").write("stepz = 1\n"), "stepz"),
    "wrong type": (
        lambda f: (f / "config.toml").open("a").write('temperature = "hot"\n'),
        "temperature must be float",
    ),
    "missing checkpoint file": (
        lambda f: (f / "base" / "model.safetensors").unlink(),
        "model.safetensors: no such file",
    ),
    "missing config.json": (
        lambda f: (f / "base" / "config.json").unlink(),
        "config.json: no such file",
    ),
    "truncated safetensors": (
        lambda f: os.truncate(f / "base" / "model.safetensors", 5000),
        "not a whole safetensors file",
    ),
    "missing tokenizer": (
        lambda f: [(f / "base" / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "tokenizer",
    ),
    "questions not JSON": (
        lambda f: (f / "questions" / "train.json").write_text("hello, world"),
        "train.json",
    ),
    "empty question file": (
        lambda f: (f / "questions" / "train.json").write_text(""),
        "train.json",
    ),
    "no questions": (lambda f: (f / "questions" / "train.json").write_text("[]"), "train.json"),
    "missing question file": (lambda f: (f / "questions" / "train.json").unlink(), "train.json"),
    "missing image": (lambda f: (f / "questions" / "0.png").unlink(), "0.png"),
    "not an image": (lambda f: (f / "questions" / "0.png").write_text("hello"), "0.png"),
    "truncated image": (lambda f: os.truncate(f / "questions" / "0.png", 3000), "0.png"),
    "no such modality": (
        lambda f: (f / "config.toml").write_text(
            (f / "config.toml").read_text().replace('"MRI"', '"Brain"')
        ),
        "Brain",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_that_names_the_cause_with_exit_code_2(
    tmp_path, monkeypatch, capsys, case
):
    write_run(tmp_path)
    spoil, named = BAD_INPUTS[case]
    spoil(tmp_path)
    capsys.readouterr()
    assert run(monkeypatch, tmp_path / "config.toml") == 2
    lines = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line.startswith("train.py: ")
    ]
    assert len(lines) == 1 and named in lines[0], lines


def test_bad_input_ends_the_real_program_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "--config", str(tmp_path / "none.toml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.count("\n") == 1
        and done.stderr.startswith("train.py: ")
        and "none.toml" in done.stderr
    )
