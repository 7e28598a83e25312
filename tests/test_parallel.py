"""Training in several processes: the same steps as in one, whoever has which share, and failures
that end all of them.
"""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import Command, run_commands
from safetensors.torch import load_file
from test_session import untimed
from test_train import rows
from tiny_run import write_run

from common.config import load_config
from common.errors import InputError
from common.program import Stopped
from training.incidents import replay
from training.parallel import ALONE, Ranks, of_this_rank
from training.stop import StopRequest

SETTINGS = {
    "plain": {},
    "knobs": dict(
        advantage_scale="batch_std",
        loss_average="token",
        oversampling=1.7,
        inner_updates=2,
        mask_truncated=True,
        importance_cap=2.0,
    ),
    "sft": dict(method="sft", sft_answer="named"),
    "shards": dict(shard=True, inner_updates=2, micro_batch_tokens=1, weight_decay=0.1),
    # Without sampling, where rounding in another batch may decide for another token.
    "bf16": dict(shard=True, dtype="bfloat16", method="sft"),
}
COUNTS = {"plain": (1, 2, 4), "knobs": (1, 2), "sft": (1, 2), "shards": (1, 2), "bf16": (1, 2)}
"""With three prompts per step, two processes have unequal shares, and one of four has none."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder by (setting, processes, copy), and results by name of the other commands."""
    root = tmp_path_factory.mktemp("ranks")
    commands: dict[object, Command] = {}

    def add(key: object, count: int, **fields: object) -> Command:
        folder = root / str(len(commands))
        folder.mkdir()
        if key[0] != "plain":  # their accuracy before and after is compared, which takes time
            fields["test_questions"] = []
        config = write_run(folder, validation_fraction=0.25, keep_checkpoints=9, **fields)
        commands[key] = Command(count, str(config))
        return commands[key]

    for name, counts in COUNTS.items():
        for count in counts:
            add((name, count), count, **SETTINGS[name])
    add("again", 2)
    for name, fields in (("moved", {}), ("moved shards", {"shard": True})):
        moving = add((name, 4), 4, save_every=1, **fields)
        for step, count in enumerate((2, 1, 2), start=1):
            commands[name, step] = Command(count, moving.config, back_to=step)
    add("stopped", 2, save_every=100).signal_in = (1, 1)
    add("stopped shards", 2, save_every=100, shard=True).signal_in = (1, 1)
    add("incident", 2).bad_steps = [1]
    add("diverged", 2, max_bad_steps=2, shard=True).bad_steps = [0, 1]
    add("other config", 2).flags_of = {"1": ["--learning_rate", "0.5"]}
    add("bad file", 2).flags = ["--train_questions", "gone.json"]
    add("killed", 2, save_every=100).killed_in = (1, 2)
    results = run_commands(list(commands.values()))
    folders = {key: Path(command.config).parent for key, command in commands.items()}
    return folders, dict(zip(commands, results, strict=True))


def weights(folder: Path, name: str = "run/model") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [untimed(row) for row in rows(folder / "run" / "metrics.jsonl")]


@pytest.mark.parametrize("name, count", [(n, c) for n in COUNTS for c in COUNTS[n] if c > 1])
def test_several_processes_take_the_steps_of_one(runs, name, count):
    folders, results = runs
    assert all(code == 0 for code, _ in results[name, count]), results[name, count]
    one, several = folders[name, 1], folders[name, count]
    for ours, theirs in zip(metrics(several), metrics(one), strict=True):
        # An estimate from a sample of each process's own weights.
        assert ours.pop("bf16_lost") == pytest.approx(theirs.pop("bf16_lost"), rel=0.1)
        # In bf16, a gradient summed in another order may round a weight to its neighbour.
        assert ours == pytest.approx(theirs, rel=3e-2 if name == "bf16" else 1e-4, abs=2e-6)
    for file in ("completions.jsonl", "validation.jsonl"):
        texts = [row.get("completion", row.get("right")) for row in rows(several / "run" / file)]
        assert texts == [
            row.get("completion", row.get("right")) for row in rows(one / "run" / file)
        ]
    moved = distance = 0.0
    base, of_one, of_several = weights(one, "base"), weights(one), weights(several)
    for key, start in base.items():
        moved += (of_one[key] - start).abs().sum()
        distance += (of_several[key] - of_one[key]).abs().sum()
    assert moved > 0 and distance < (0.05 if name == "bf16" else 0.01) * moved
    before, after = (json.loads((f / "run" / "summary.json").read_text()) for f in (one, several))
    assert before["after"] == after["after"] and before["questions"] == after["questions"]


def test_two_runs_on_as_many_processes_are_equal_byte_for_byte(runs):
    folders, _ = runs
    first, second = (
        folders[key] / "run/model/model.safetensors" for key in (("plain", 2), "again")
    )
    assert first.read_bytes() == second.read_bytes()
    assert metrics(folders["plain", 2]) == metrics(folders["again"])


@pytest.mark.parametrize("name", ["moved", "moved shards"])
def test_a_run_moves_between_numbers_of_processes(runs, name):
    folders, results = runs
    assert all(code == 0 for step in (1, 2, 3) for code, _ in results[name, step])
    for moved, stayed in zip(metrics(folders[name, 4]), metrics(folders["plain", 1]), strict=True):
        assert moved.pop("bf16_lost") == pytest.approx(stayed.pop("bf16_lost"), rel=0.1)
        assert moved == pytest.approx(stayed, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("name", ["stopped", "stopped shards"])
def test_a_signal_to_one_process_stops_all_after_the_same_step(runs, name):
    folders, results = runs
    (code, lead), (other_code, other) = results[name]
    assert code == other_code == 143
    assert "the same command resumes from" in lead and "step-000002" in lead
    assert "resumes" not in other
    assert len(metrics(folders[name])) == 2


def test_an_incident_holds_the_whole_step_and_a_run_that_diverged_ends_with_one_line(runs):
    folders, results = runs
    assert [code for code, _ in results["incident"]] == [0, 0]
    (incident,) = (folders["incident"] / "run" / "incidents").glob("step-*")
    assert incident.name == "step-000001"
    lines = replay(incident)
    assert len(lines) == 4 and all("gradient finite" in line for line in lines[1:])
    (code, lead), (other_code, other) = results["diverged"]
    assert code == other_code == 2
    assert "not finite in 2 consecutive steps" in lead and "consecutive" not in other


def test_what_differs_between_processes_and_what_all_find_bad_is_one_line(runs):
    _, results = runs
    (code, lead), (other_code, other) = results["other config"]
    assert (code, other_code) == (2, 2)
    assert lead.strip().splitlines() == [
        "train.py: rank 1 has different config than rank 0: give all the same"
    ]
    assert not other
    (code, lead), (other_code, other) = results["bad file"]
    assert (code, other_code) == (2, 2)
    assert len(lead.strip().splitlines()) == 1 and "gone.json" in lead
    assert not other


def test_a_process_that_dies_ends_the_others_with_the_steps_saved(runs):
    folders, results = runs
    ((code, lead),) = results["killed"]
    assert code == 2
    assert "the exchange with another process failed" in lead
    saved = sorted((folders["killed"] / "run" / "checkpoints").glob("step-*"))
    assert saved[-1].name == "step-000002"


def test_shares_are_neighbours_and_differ_by_one_at_most():
    for groups, count in ((8, 3), (2, 4), (4, 4), (7, 1)):
        shares = [range(groups)[Ranks(rank, count).share(groups)] for rank in range(count)]
        assert [place for share in shares for place in share] == list(range(groups))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_each_process_has_its_own_gpu_and_the_run_folder_says_cuda(tmp_path, monkeypatch):
    config = load_config(write_run(tmp_path), {"device": "cuda"})
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert of_this_rank(config, Ranks(rank, 2)).device == f"cuda:{rank}"
    assert of_this_rank(config, ALONE) == config
    with pytest.raises(InputError, match="device is cuda:1: with several processes"):
        of_this_rank(replace(config, device="cuda:1"), Ranks(0, 2))


def test_what_is_sent_of_a_prompt_leaves_its_image_behind(prompts):
    prompt = max(prompts, key=lambda one: len(one.patches_SC))
    whole, sent = len(pickle.dumps(prompt)), len(pickle.dumps(prompt.without_images()))
    assert sent < whole - prompt.patches_SC.nbytes + 1000


def test_a_signal_that_arrives_while_the_processes_agree_is_not_lost():
    stop = StopRequest(alone=False)

    def gather(signal):
        stop.signal = 15  # now, too late for this round
        return [signal, 0]

    stop.agree(gather)
    with pytest.raises(Stopped) as stopped:
        stop.agree(lambda signal: [signal, 0])
    assert stopped.value.signal == 15 and stop.agreed
