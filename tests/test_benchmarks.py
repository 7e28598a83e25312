"""The benchmarks, ours and the peers', do the work they claim and report all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.__main__ import MARKS, PAGE, RESULTS, write_tables
from benchmarks.common import FAST_PATHS, argument_parser, endless, run_measurement, step_config
from benchmarks.grpo_step import WITHOUT, measured_steps
from benchmarks.peer_transformers import logprobs, repeated
from benchmarks.peers import ratios
from benchmarks.shapes import SHAPES, make_checkpoint, shape
from data import load_vocabulary
from data.choice import load_questions, prompt_encoder
from grpo.rollout import MicroBatch, collate, completion_logprobs
from model import Qwen2VL, load_model

ROOT = Path(__file__).parent.parent
SMALL = ["--side", "56", "--tokens", "3", "--group", "2", "--steps", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint("tiny", tmp_path_factory.mktemp("shapes") / "tiny")


def arguments(*more: str):
    return argument_parser("", "").parse_args([*SMALL, *more])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_number_of_parameters_in_their_names(name: str) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Qwen2VL(shape(name)).parameters())
    assert count == {"tiny": 422_016, "46m": 45_944_320, "2b": 2_208_985_600}[name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_measurement_runs_whole_steps_of_fixed_length_and_reports_everything(
    checkpoint, tmp_path, dtype: str
) -> None:
    result = measured_steps(arguments("--dtype", dtype), checkpoint, tmp_path)
    assert result["seconds"].keys() == {
        "rollout",
        "rewards",
        "reference",
        "old policy",
        "update",
        "optimizer",
    }
    assert result["seconds_per_step"] == pytest.approx(sum(result["seconds"].values()))
    assert result["peak_rss_mb"] > 100 and result["prompts"] == 2 and result["machine"]
    without = measured_steps(
        arguments("--dtype", dtype, "--beta", "0"), checkpoint, tmp_path / "again"
    )
    assert without["seconds"]["reference"] < 0.2 * without["seconds"]["update"]
    json.dumps(result)


def test_every_fast_path_can_be_left_out(checkpoint) -> None:
    """In a process of its own, because a fast path that is left out stays out."""
    attributes = (
        "model.linear._HAS_ONEDNN, grpo.sampler.arranged, training.prepare.keep_freed_memory"
    )
    attributes += ", grpo.sampler.SHRINK_AT, model.cache.merged_attention"
    attributes += ", grpo.rollout.token_logprobs"
    code = f"""
import sys, tempfile, pathlib
from benchmarks import grpo_step as bench
from benchmarks.common import argument_parser
import grpo.rollout, training.prepare, grpo.sampler, model.cache, model.linear
before = [{attributes}]
args = argument_parser("", "").parse_args({SMALL!r} + ["--without", *bench.WITHOUT])
folder = pathlib.Path(tempfile.mkdtemp())
bench.measured_steps(args, pathlib.Path({str(checkpoint)!r}), folder)
after = [{attributes}]
assert len(bench.WITHOUT) == len(before)
assert not any(a is b for a, b in zip(before, after))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_replicated_peer_computes_the_same_log_probabilities(checkpoint, tmp_path) -> None:
    args = arguments()
    config = step_config(checkpoint, tmp_path, args)
    ours, theirs = (
        load_model(checkpoint),
        Qwen2VLForConditionalGeneration.from_pretrained(checkpoint),
    )
    vocabulary = endless(load_vocabulary(checkpoint, ours.config), ours.config)
    prompt = prompt_encoder(vocabulary, ours.config, config).encode(load_questions(config).train[0])
    completions = torch.randint(0, 700, (3, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slow = logprobs(
            theirs,
            repeated([prompt], 3, ours.config.image_token_id, "cpu"),
            completions,
            vocabulary.allowed_V,
        )
        mask = torch.ones(1, 3, 4, dtype=torch.bool)
        batch = MicroBatch(slice(None), collate([prompt]), completions[None], mask)
        fast, _ = completion_logprobs(ours, batch, vocabulary.allowed_V, 1.0)
    torch.testing.assert_close(fast[0], slow, rtol=0, atol=1e-4)


def test_log_probabilities_need_a_fraction_of_the_memory_of_full_logits() -> None:
    extra = []
    for options in ([], ["--full"]):
        size = ["--positions", "2048", "--vocabulary", "40000", "--hidden", "64"]
        command = [sys.executable, "-m", "benchmarks.logprob_memory", *size, *options]
        extra.append(
            json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)[
                "extra_mb"
            ]
        )
    # The smaller figure includes some 100 MB of code that is loaded.
    assert 5 * extra[0] < extra[1] > 600


def test_the_page_gets_new_tables_between_its_marks_and_keeps_its_text(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    ours = {
        "seconds_per_step": 2.0,
        "peak_rss_mb": 1000.0,
        "rollout_tokens_per_second": 500.0,
        "machine": "M",
    }
    ours |= {
        "threads": 2,
        "seconds": {"rollout": 1.0, "reference": 0.2, "update": 0.7, "optimizer": 0.1},
    }
    peer = {"seconds_per_step": 24.0, "peak_rss_mb": 5000.0}  # without phases, like TRL
    pair = {"ours": [ours, ours], "trl": [peer, peer | {"seconds_per_step": 20.0}]}
    assert ratios(pair["ours"], pair["trl"]) == {"step": [12.0, 10.0], "memory": [5.0, 5.0]}
    results = {
        "date": "2026-01-02",
        "rounds": 2,
        "minutes": 3.0,
        "versions": {"torch": "2"},
        "peers 448": pair,
        "peers 224": pair,
        "groups": {"4": [ours], "16": [ours | {"seconds_per_step": 3.0}]},
        "ragged": {"nothing": [ours], "dropping the finished": [ours]},
        "without": {"nothing": [ours], "kept memory": [ours | {"seconds_per_step": 2.5}]},
        "dtypes": {"float32": [ours], "bfloat16": [ours]},
        "logprobs": {"": {"extra_mb": 100.0}, "--full": {"extra_mb": 7000.0}},
    }
    write_tables(results, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "11.0 (10.0 to 12.0)" in text and "1.5 (1.5 to 1.5)" in text and "1/70" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--group", "1"], "group"),
        (["--tokens", "0"], "tokens"),
        (["--prompts", "0"], "prompts"),
        (["--checkpoint", "46M"], "tiny, 46m, 2b"),
        (["--side", "-5"], "side"),
        (["--device", "cuda"], "no CUDA GPU"),
        (["--steps", "0"], "steps"),
        (["--side", "10"], "side"),
        (["--device", "tpu"], "device"),
    ],
)
def test_a_wrong_argument_is_one_line_with_exit_code_2(
    flags: list[str], named: str, checkpoint, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["grpo_step", "--checkpoint", str(checkpoint), *SMALL, *flags])
    try:
        code = run_measurement("grpo_step", "", measured_steps)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2 and named in error


def test_the_command_line_offers_every_fast_path() -> None:
    assert tuple(WITHOUT) == FAST_PATHS


def test_the_tables_on_the_page_match_the_saved_results(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    write_tables(json.loads(RESULTS.read_text()), page)
    assert page.read_text() == PAGE.read_text()
