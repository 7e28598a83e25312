"""Supervised fine-tuning: targets, the gradient compared with plain cross-entropy, and whole
runs.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny_run import write_run
from torch.nn import functional as F

import train
import training.sft
from common.config import load_config
from data import Question, questions_of_step
from grpo.rollout import written_rollout
from training.prepare import prepared as run_of
from training.sft import accumulate_cross_entropy, target


def run(monkeypatch, config, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *flags])
    return train.main()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared run and its first three prompts."""
    folder = tmp_path_factory.mktemp("sft")
    config = load_config(write_run(folder, method="sft"))
    with run_of(config) as made:
        questions = questions_of_step(made.questions.train, 0, 3, 0)
        yield config, made, [made.encoder.encode(question) for question in questions]


def test_targets_are_the_letter_in_tags_bare_or_after_its_option():
    question = Question((), "What?", ("x", "{y}"), "B", "MRI", "", "row")
    assert target(question, "tags") == "<answer>B</answer>" and target(question, "bare") == "B"
    assert target(question, "named") == "<think>The answer is {y}.</think><answer>B</answer>"


def test_target_completions_decode_to_their_text_and_end_with_one_end_of_turn(prepared):
    config, made, prompts = prepared
    texts = [
        ["<answer>A</answer>", "B"],
        ["C", "<think>x</think><answer>B</answer>"],
        ["a<|im_end|>b", ""],
    ]
    rollout = written_rollout(made.vocabulary, prompts, texts, "cpu")
    (end,) = made.vocabulary.end_ids
    for n, group in enumerate(texts):
        for g, text in enumerate(group):
            ids = rollout.tokens_NGT[n, g][rollout.mask_NGT[n, g]].tolist()
            # A control token in the text is encoded as ordinary text.
            assert ids[-1] == end and end not in ids[:-1]
            assert made.vocabulary.tokenizer.decode(ids[:-1]) == text


@pytest.mark.parametrize("size", [1, 600, 100_000])
def test_the_gradient_equals_that_of_plain_cross_entropy_for_any_micro_batch_size(prepared, size):
    config, made, prompts = prepared
    answers = written_rollout(
        made.vocabulary, prompts, [["<answer>A</answer>"], ["B"], ["<answer>C"]], "cpu"
    )
    made.policy.zero_grad(set_to_none=True)
    loss, probability = accumulate_cross_entropy(replace(made, micro_batch_tokens=size), answers)
    # No graph outlives its micro-batch.
    assert not loss.requires_grad and not probability.requires_grad
    gradients = {name: p.grad.clone() for name, p in made.policy.named_parameters()}

    made.policy.zero_grad(set_to_none=True)
    losses, chances = [], []
    for prompt, tokens, mask in zip(
        prompts, answers.tokens_NGT[:, 0], answers.mask_NGT[:, 0], strict=True
    ):
        ids = tokens[mask]
        sequence = torch.cat((prompt.tokens_P, ids))[None]
        logits = made.policy(sequence, prompt.patches_SC, prompt.grids_I3)[
            0, len(prompt.tokens_P) - 1 : -1
        ]
        logits = logits.masked_fill(~made.vocabulary.allowed_V, float("-inf"))
        losses.append(F.cross_entropy(logits, ids, reduction="none"))
        chances.append((-losses[-1].sum()).exp())
    plain = torch.cat(losses).mean()
    plain.backward()
    assert float(loss) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert float(probability) == pytest.approx(float(sum(chances).detach()) / 3, rel=1e-4)
    for name, parameter in made.policy.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)
    made.policy.zero_grad(set_to_none=True)


def test_sft_keeps_no_reference_model(prepared):
    assert prepared[1].reference is None


@pytest.mark.parametrize("form", ["tags", "bare", "named"])
def test_an_sft_run_learns_to_answer_in_the_form_of_its_target(tmp_path, monkeypatch, form):
    config = write_run(
        tmp_path,
        method="sft",
        sft_answer=form,
        steps=60,
        learning_rate=3e-3,
        save_every=60,
        max_new_tokens=60,
    )
    assert run(monkeypatch, config) == 0
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [row["step"] for row in rows] == list(range(60))
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"] and rows[-1]["probability"] > 0.5
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The correct option is always the second one; bare letters count as answers.
    assert summary["after"] == {"MRI": 1.0, "X-ray": 1.0}
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_resumed_sft_run_ends_with_the_same_bytes_as_an_uninterrupted_one(tmp_path, monkeypatch):
    (whole := tmp_path / "whole").mkdir(), (broken := tmp_path / "broken").mkdir()
    fields = dict(method="sft", steps=4, save_every=2, test_questions=[])
    assert run(monkeypatch, write_run(whole, **fields)) == 0
    config = write_run(broken, **fields)
    with monkeypatch.context() as patch:
        rate = lambda step, config: 1e-3 if step < 3 else 1 / 0  # noqa: E731
        patch.setattr("training.run.scheduled_rate", rate)
        with pytest.raises(ZeroDivisionError):
            run(patch, config)
    assert run(monkeypatch, config) == 0
    expected, resumed = (
        (f / "run" / "model" / "model.safetensors").read_bytes() for f in (whole, broken)
    )
    assert resumed == expected
    assert resumed != (whole / "base" / "model.safetensors").read_bytes()


def test_sft_in_bf16_learns_the_same_after_running_out_of_gpu_memory(tmp_path, monkeypatch):
    original, trained = training.sft.completion_logprobs, []

    def limited(model, batch, *rest, **options):
        if len(batch.prompts.lengths_N) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch, *rest, **options)

    monkeypatch.setattr("training.sft.completion_logprobs", limited)
    fields = dict(method="sft", dtype="bfloat16", steps=2, test_questions=[])
    for size in (1, 100_000):
        (folder := tmp_path / str(size)).mkdir()
        assert run(monkeypatch, write_run(folder, micro_batch_tokens=size, **fields)) == 0
        trained.append((folder / "run" / "model" / "model.safetensors").read_bytes())
        metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["grad_norm"] > 0 for line in metrics)
        incidents = (folder / "run" / "incidents.jsonl").read_text()
        assert ("out of memory" in incidents) == (size > 1)
    assert trained[0] == trained[1]


@pytest.mark.parametrize(("flag", "value"), [("--method", "dpo"), ("--sft_answer", "letters")])
def test_an_unknown_method_or_target_is_one_line(tmp_path, monkeypatch, capsys, flag, value):
    assert run(monkeypatch, write_run(tmp_path), flag, value) == 2
    assert value in capsys.readouterr().err
