"""train.py --dry-run: its estimates compared with real runs and real tensors, and that it writes
nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import write_run

from benchmarks.shapes import TOKENIZER, make_checkpoint, make_questions, shape
from common.config import load_config
from data import load_vocabulary
from data.choice import prompt_encoder
from grpo.rollout import MicroBatch, collate, completion_logprobs
from model import Qwen2VL, read_config
from model.attention import causal_attention
from model.config import config_json
from model.vision import run_block
from planning.footprint import FP32_GRADIENTS, Rehearsal
from planning.meter import MEASURED, Meter, fused_attention
from planning.speed import ASSUMED, Speed
from planning.workload import Workload

ROOT = Path(__file__).parent.parent
PRINT_PEAK = """import resource, train
train.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"""
"""A program that runs train.py, and prints its peak memory in bytes on the last line."""


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run train.py in a separate process; the last line of its output is its peak memory."""
    command = [sys.executable, "-c", PRINT_PEAK, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def read(config_file: Path, **fields: object) -> tuple[Rehearsal, Workload]:
    """The rehearsal and the workload of a config, as in a dry run."""
    config = load_config(config_file, fields)
    model = read_config(config.model)
    vocabulary = load_vocabulary(config.model, model)
    encoder = prompt_encoder(vocabulary, model, config)
    load = Workload(config, encoder, vocabulary)
    return Rehearsal(config, model, encoder, load), load


def write_config(folder: Path, checkpoint: Path, count: int, **fields: object) -> Path:
    """Write the config of a run on `count` noise images: half to train on, half to test on."""
    rows = json.loads(make_questions(count, 224, folder).read_text())
    for name, split in (("train", rows[: count // 2]), ("test", rows[count // 2 :])):
        (folder / f"{name}.json").write_text(json.dumps(split))
    config = {
        "model": str(checkpoint),
        "train_questions": str(folder / "train.json"),
        "test_questions": [str(folder / "test.json")],
        "run_dir": str(folder / "run"),
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_new_tokens": 12,
        "save_every": 2,
        **fields,
    }
    (folder / "config.toml").write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    )
    return folder / "config.toml"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("46m", {}),
        (
            "46m",
            {
                "dtype": "bfloat16",
                "activation_checkpointing": True,
                "beta": 0.0,
                "micro_batch_tokens": 300,
            },
        ),
    ],
)
def test_the_planned_peak_is_within_15_percent_of_that_of_the_run(tmp_path, name, fields):
    config = write_config(tmp_path, make_checkpoint(name, tmp_path / name), 8, **fields)
    plan = launched("--config", str(config), "--dry-run").stdout
    planned, unit = re.search(r"peak of the process: ([\d.,]+) (MB|GB)", plan).groups()
    planned = float(planned.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]
    measured = int(launched("--config", str(config)).stdout.split("\n")[-2])
    assert planned == pytest.approx(measured, rel=0.15)


def test_a_2b_model_on_a_gpu_is_planned_without_gpu_or_weights_in_a_minute_and_4_gb(tmp_path):
    (tmp_path / "2b").mkdir()
    (tmp_path / "2b" / "config.json").write_text(json.dumps(config_json(shape("2b"))))
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        shutil.copy(TOKENIZER / file, tmp_path / "2b")
    fields = {
        "dtype": "bfloat16",
        "device": "cuda",
        "group_size": 4,
        "max_new_tokens": 512,
        "min_pixels": 300000,
    }
    config = write_config(tmp_path, tmp_path / "2b", 24, **fields)
    started = time.monotonic()
    *lines, peak = launched("--config", str(config), "--dry-run").stdout.splitlines()
    assert time.monotonic() - started < 60 and int(peak) < 4e9
    plan = "\n".join(lines)
    assert "2,209.0 M parameters" in plan and "its weights are not downloaded yet" in plan
    gpu = float(re.search(r"peak of GPU memory: ([\d.]+) GB", plan).group(1))
    assert 44 < gpu < 80  # policy, reference, masters, moments and gradients alone take 44
    assert "peak of host memory" in plan and "30.93 GB per checkpoint" in plan
    assert not (tmp_path / "run").exists()


class RealMeter(Meter):
    """A meter whose tensors keep their values, as in the real run."""

    def call(self, func, inputs, args, kwargs):
        return func(*args, **kwargs)


@pytest.mark.parametrize("fields", [{}, {"activation_checkpointing": True}, {"dtype": "bfloat16"}])
def test_a_rehearsed_update_uses_as_much_memory_as_one_on_real_tensors(tmp_path, fields):
    config = write_run(tmp_path, max_new_tokens=40, test_questions=[])
    rehearsal, load = read(config, micro_batch_tokens=10**6, **fields)
    policy = Qwen2VL(rehearsal.policy.config).to(rehearsal.policy.embed.weight.dtype)
    policy.recompute = rehearsal.config.activation_checkpointing
    prompt = rehearsal.encoder.encode(load.trained)
    mask = torch.ones(load.micro_batch, load.group_size, load.completion, dtype=torch.bool)
    allowed = torch.ones(policy.config.vocab_size, dtype=torch.bool)
    meter = RealMeter(ASSUMED, outside=policy.parameters())
    with meter.phase() as real:
        prompts = collate([prompt] * load.micro_batch)
        batch = MicroBatch(slice(None), prompts, mask.long(), mask)
        logp, _ = completion_logprobs(policy, batch, allowed, 1.0)
        logp.sum().backward()
    rehearsed = rehearsal.run(ASSUMED)["update"].memory
    assert rehearsed[MEASURED] == pytest.approx(real.memory[MEASURED], rel=0.05)


def test_a_storage_counts_from_its_first_tensor_to_its_last():
    outside = torch.empty(300, device="meta")
    meter = Meter(ASSUMED, outside=[outside])
    with meter.phase() as together:
        a = torch.empty(1000)
        view = a[10:]
        del a
        b = torch.empty(500)
        c = outside[5:]
    with meter.phase() as after:
        del view
        d = torch.empty(200)
    assert together.memory == {MEASURED: 6000}
    assert after.memory == {MEASURED: 6000}  # at its start
    assert b.is_meta and c.is_meta and d.is_meta


def test_tensors_that_determine_shapes_keep_their_values_and_others_do_not():
    with Meter(ASSUMED).phase():
        mask = torch.arange(6) < 4
        picked = torch.empty(9, 3).index_select(0, torch.arange(3, 9)[mask])
        total = int(mask.sum())
    assert picked.is_meta and picked.shape == (4, 3) and total == 4


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_stores_no_scores_and_is_restored_afterwards(recompute):
    q, k = (torch.empty(1, heads, 2000, 8, device="meta", requires_grad=True) for heads in (4, 2))
    library = fused_attention()
    with Meter(ASSUMED).phase() as phase:
        run_block(recompute, causal_attention, q, k, k).sum().backward()
    # The scores of all heads are 1,000 times as large as q.
    assert phase.memory.total() < 20 * q.nbytes
    del library
    with Meter(ASSUMED).phase() as phase:
        causal_attention(q, k, k)
    assert phase.memory.total() > 500 * q.nbytes
    real = torch.randn(1, 2, 5, 8)
    assert causal_attention(real, real, real).isfinite().all()


def test_matrix_products_forward_and_backward_are_timed():
    a = torch.empty(640, 320, device="meta", requires_grad=True)
    b = torch.empty(320, 160, device="meta")
    speed = Speed(flops=1e3, read=1e12, moved=1e12, source="")  # so slow that nothing else matters
    with Meter(speed).phase() as phase:
        (a @ b).sum().backward()
    assert phase.seconds == pytest.approx(2 * 2 * 640 * 320 * 160 / 1e3, rel=1e-4)


def test_offloaded_masters_and_moments_are_in_host_memory(tmp_path):
    fields = {"device": "cuda", "offload_optimizer": True, "max_new_tokens": 10}
    rehearsal, _ = read(write_run(tmp_path, dtype="bfloat16", **fields))
    phases = rehearsal.run(ASSUMED)
    update, host = phases["update"].memory, phases["host"].memory
    assert update["policy"] == rehearsal.weights
    assert not update.keys() & {"fp32 masters", "AdamW's moments", FP32_GRADIENTS}
    assert host["fp32 masters"] == host[FP32_GRADIENTS] == 2 * rehearsal.weights
    assert host["AdamW's moments"] == 4 * rehearsal.weights


def test_a_step_is_planned_with_the_longest_prompts(tmp_path):
    config = write_run(tmp_path)
    _, load = read(config, steps=8)
    longest = max(load.prompts[question] for question in load.questions["train"])
    assert load.prompts[load.trained] == longest
    _, one = read(config, micro_batch_tokens=1)
    _, all_of_them = read(config, micro_batch_tokens=10**6, prompts_per_step=3)
    assert one.micro_batch == 1 and all_of_them.micro_batch == 3


def test_the_planned_rollout_samples_the_spare_questions_and_the_update_leaves_them_out(tmp_path):
    config = write_run(tmp_path)
    alone = read(config)[0].run(ASSUMED)
    spares = read(config, oversampling=3.0)[0].run(ASSUMED)
    assert spares["rollout"].memory.total() > alone["rollout"].memory.total()
    assert spares["rollout"].seconds > alone["rollout"].seconds
    assert spares["update"].memory == alone["update"].memory


def test_sft_has_no_rollout_and_no_reference(tmp_path):
    rehearsal, load = read(write_run(tmp_path, method="sft"))
    assert not {"rollout", "reference"} & rehearsal.run(ASSUMED).keys()
    assert load.group_size == 1 and load.completion < 20


def test_several_updates_have_a_pass_of_the_old_policy_beside_that_of_the_reference(tmp_path):
    config = write_run(tmp_path)
    phases = read(config, inner_updates=2)[0].run(ASSUMED)
    assert list(phases) == ["test", "rollout", "reference", "old policy", "update", "saving"]
    old, reference = phases["old policy"], phases["reference"]
    assert old.seconds == pytest.approx(reference.seconds) and old.seconds > 0
    assert old.memory == reference.memory
    once = read(config, inner_updates=1)[0].run(ASSUMED)
    assert "old policy" not in once
    assert phases["update"].seconds == pytest.approx(2 * once["update"].seconds)
    # Without a reference too, and never in SFT.
    alone = read(config, inner_updates=2, beta=0.0)[0].run(ASSUMED)
    assert alone["old policy"].seconds == pytest.approx(old.seconds) and "reference" not in alone
    assert "old policy" not in read(config, inner_updates=2, method="sft")[0].run(ASSUMED)


def dry_run(monkeypatch, config: Path, *flags: str) -> int:
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), "--dry-run", *flags])
    return train.main()


def test_a_dry_run_needs_no_weights_and_writes_nothing(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert dry_run(monkeypatch, config) == 0
    assert sorted(tmp_path.rglob("*")) == before
    plan = capsys.readouterr().out
    assert (
        "8 questions: MRI 8" in plan
        and "MRI 8, X-ray 4" in plan
        and "would start from scratch" in plan
    )
    assert 15 < plan.count("\n") < 40 and max(map(len, plan.split("\n"))) < 160


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        ((), "4, 1.50 epochs"),  # 4 steps of 3 questions out of 8
        (("--oversampling", "2"), "4, 3.00 epochs"),  # the spare questions are drawn as well
        (("--oversampling", "2", "--method", "sft"), "4, 1.50 epochs"),
    ],
)
def test_spare_questions_count_in_the_planned_epochs(tmp_path, monkeypatch, capsys, flags, epochs):
    assert dry_run(monkeypatch, write_run(tmp_path), *flags) == 0
    assert epochs in capsys.readouterr().out


def test_the_time_of_the_old_policys_pass_is_printed(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)
    assert dry_run(monkeypatch, config, "--inner_updates", "2") == 0
    assert re.search(r"reference [\de.-]+ s, old policy [\de.-]+ s, upd", capsys.readouterr().out)
    assert dry_run(monkeypatch, config) == 0
    assert "old policy" not in capsys.readouterr().out


def test_a_dry_run_names_the_checkpoint_to_resume_from_and_does_not_move_damaged_ones(
    tmp_path, monkeypatch, capsys
):
    import train

    config = write_run(tmp_path, test_questions=[])
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    assert train.main() == 0
    newest = tmp_path / "run" / "checkpoints" / "step-000004"
    os.truncate(newest / "optimizer.safetensors", 100)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    assert dry_run(monkeypatch, config) == 0
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    plan = capsys.readouterr().out
    assert (
        "would resume from" in plan and "step-000002" in plan and f"! {newest} is damaged" in plan
    )
    assert dry_run(monkeypatch, config, "--learning_rate", "0.5") == 2
    assert "with different values of learning_rate" in capsys.readouterr().err


BAD_INPUTS = {
    "missing config.json": (
        lambda f: (f / "base" / "config.json").unlink(),
        "config.json: no such file",
    ),
    "missing tokenizer": (
        lambda f: [(f / "base" / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "tokenizer",
    ),
    "missing image": (lambda f: (f / "questions" / "0.png").unlink(), "0.png"),
    "image in both training and test data": (
        lambda f: shutil.copy(f / "questions" / "train.json", f / "questions" / "test.json"),
        "trained on",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gives_the_same_error_message_as_the_run_itself(
    tmp_path, monkeypatch, capsys, case
):
    import train

    config = write_run(tmp_path)
    spoil, named = BAD_INPUTS[case]
    spoil(tmp_path)
    assert dry_run(monkeypatch, config) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and named in output.err
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    assert train.main() == 2
    assert capsys.readouterr().err == output.err
