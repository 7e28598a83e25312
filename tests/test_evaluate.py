"""evaluate.py from end to end on tiny models: its results, resuming after a kill, audits that fire,
bad input.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_model, write_run

import evaluate
import train
from data import Question
from evaluation import answers, compare
from evaluation.records import question_ids
from evaluation.results import (
    ablated_credits,
    accuracy_rows,
    early_answering,
    faithfulness_rows,
    majority_credit,
    pair_rows,
    sample_rows,
)
from model import load_model, save_model

MODELS = ["base", "sft", "grpo"]


def run(monkeypatch, program, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, flags)])
    return program.main()


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished GRPO run and a finished SFT run; tests copy them before changing anything."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_run(folder, steps=1, eval_batch_prompts=5)
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, train, "--config", config) == 0
        sft = (
            "--method",
            "sft",
            "--steps",
            "20",
            "--learning_rate",
            "3e-3",
            "--run_dir",
            folder / "run_sft",
        )
        assert run(patch, train, "--config", config, *sft) == 0
    return folder


@pytest.fixture(scope="module")
def finished(trained):
    """The same with an evaluation, which tests only read."""
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, evaluate, "--config", trained / "config.toml", "--samples", "3") == 0
    return trained / "run" / "eval"


@pytest.fixture
def copied(trained, tmp_path):
    """A private copy of the runs, not yet evaluated."""
    for name in ("base", "questions", "run", "run_sft"):
        shutil.copytree(trained / name, tmp_path / name)
    shutil.rmtree(tmp_path / "run" / "eval", ignore_errors=True)
    for file in (Path("config.toml"), Path("run/config.toml"), Path("run_sft/config.toml")):
        (tmp_path / file).write_text(
            (trained / file).read_text().replace(str(trained), str(tmp_path))
        )
    return tmp_path


def test_an_evaluation_writes_results_predictions_and_a_report(finished):
    results = json.loads((finished / "results.json").read_text())
    predictions = rows(finished / "predictions.jsonl")
    assert [model["name"] for model in results["models"]] == MODELS
    assert len(predictions) == 3 * 12 and {row["contract"] for row in predictions} == {
        results["contract"]["hash"]
    }
    whole = [row for row in results["accuracy"] if row["question_type"] is None]
    assert [(row["model"], row["modality"], row["n"]) for row in whole] == [
        (model, modality, n) for model in MODELS for modality, n in (("MRI", 8), ("X-ray", 4))
    ]
    for row in whole:
        counted = [
            p
            for p in predictions
            if p["model"] == row["model"] and p["modality"] == row["modality"]
        ]
        assert row["right"] == sum(p["letter"] == p["ground_truth"] for p in counted)
        assert (
            row["low"] <= row["rate"] <= row["high"]
            and row["best_blind_rate"] >= row["chance"] > 0.3
        )
    assert len(results["pairs"]) == 3 * 2 and results["blind"].keys() >= {
        "chance",
        "text_prior",
        "length",
    }
    assert {row["pass_at_k"] >= row["mean"] for row in results["samples"]["table"]} == {True}
    assert (finished / "report.html").read_text().startswith("<!doctype html>")


def test_sft_that_learned_the_letter_is_right_but_not_in_the_format(finished):
    results = json.loads((finished / "results.json").read_text())
    (row,) = [
        r
        for r in results["accuracy"]
        if (r["model"], r["modality"], r["question_type"]) == ("sft", "MRI", None)
    ]
    assert row["rate"] == row["strict"] == 1.0 and row["format"] == 0.0
    assert not row[
        "sees"
    ]  # the right option is always the second, which a guess without the image finds too


def test_a_second_call_asks_no_model_again(copied, monkeypatch, capsys):
    assert run(monkeypatch, evaluate, "--config", copied / "config.toml") == 0
    before = {
        name: (copied / "run" / "eval" / name).read_bytes()
        for name in ("predictions.jsonl", "probes.jsonl")
    }
    first = capsys.readouterr().out
    monkeypatch.setattr(answers, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert run(monkeypatch, evaluate, "--config", copied / "config.toml") == 0
    assert {name: (copied / "run" / "eval" / name).read_bytes() for name in before} == before
    assert capsys.readouterr().out == first


def test_a_killed_evaluation_resumes_and_ends_with_the_same_answers(finished, copied, monkeypatch):
    real, calls = answers.sample_groups, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("power cut")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "sample_groups", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            run(patch, evaluate, "--config", copied / "config.toml")
    file = copied / "run" / "eval" / "predictions.jsonl"
    assert 0 < len(rows(file)) < 3 * 12
    assert run(monkeypatch, evaluate, "--config", copied / "config.toml") == 0
    keyed = [
        {(r["model"], r["id"]): r["completion"] for r in rows(f)}
        for f in (file, finished / "predictions.jsonl")
    ]
    assert keyed[0] == keyed[1] and len(rows(file)) == 3 * 12


def test_only_a_model_that_was_trained_again_is_asked_again(copied, monkeypatch, capsys):
    flags = ("--config", copied / "config.toml", "--models", "base,grpo", "--out", copied / "out")
    assert run(monkeypatch, evaluate, *flags) == 0
    file = copied / "out" / "predictions.jsonl"
    base = [row for row in rows(file) if row["model"] == "base"]
    save_model(tiny_model(seed=5), copied / "run" / "model")
    capsys.readouterr()
    assert run(monkeypatch, evaluate, *flags) == 0
    assert f"{12 * 6} rows dropped" in capsys.readouterr().out
    assert [row for row in rows(file) if row["model"] == "base"] == base


def test_a_partial_evaluation_leaves_the_full_results_alone(finished, trained, monkeypatch, capsys):
    whole = {file.name: file.read_bytes() for file in finished.iterdir()}
    train = trained / "questions" / "train.json"
    for flags, name in (
        (("--models", "base"), "eval-base"),
        (("--models", f"base,x={trained / 'base'}", "--questions", train), "eval-base-x-train"),
    ):
        assert run(monkeypatch, evaluate, "--config", trained / "config.toml", *flags) == 0
        folder = trained / "run" / name
        assert str(folder) in capsys.readouterr().out.splitlines()[-1]
        assert json.loads((folder / "results.json").read_text())["models"][0]["name"] == "base"
        shutil.rmtree(folder)
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == whole


def test_a_model_that_ignores_its_image_is_caught_by_the_blind_baselines(copied, monkeypatch):
    blind = load_model(copied / "run" / "model")
    with torch.no_grad():
        for parameter in blind.visual.merger_fc2.parameters():
            parameter.zero_()
    save_model(blind, copied / "blind")
    shutil.copy(copied / "base" / "tokenizer.json", copied / "blind")
    shutil.copy(copied / "base" / "tokenizer_config.json", copied / "blind")
    flags = ("--models", f"base,blind={copied / 'blind'}", "--out", copied / "out")
    assert run(monkeypatch, evaluate, "--config", copied / "config.toml", *flags) == 0
    results = json.loads((copied / "out" / "results.json").read_text())
    own = [row for row in results["accuracy"] if row["model"] == "blind"]
    assert own and all(rate == row["rate"] for row in own for rate in row["ablated"].values())
    assert not any(row["sees"] for row in own)
    probes = {
        (r["model"], r["probe"], r["id"]): r.get("completion")
        for r in rows(copied / "out" / "probes.jsonl")
    }
    plain = {
        (r["model"], r["id"]): r["completion"] for r in rows(copied / "out" / "predictions.jsonl")
    }
    same = {"base": [], "blind": []}
    for (model, i), text in plain.items():
        same[model].append(probes[model, "noise image", i] == text)
    assert all(same["blind"]) and not all(same["base"])


def test_questions_of_two_files_with_one_name_stay_apart():
    rows = [
        Question((), "What?", ("x", "y"), "A", "MRI", "", source)
        for source in ("t row 1", "t row 2", "t row 1")
    ]
    assert question_ids(rows) == ["t row 1", "t row 2", "t row 1 (2)"]


def test_two_evaluations_are_compared_by_question_and_incomparable_ones_are_refused(
    finished, copied, monkeypatch, capsys
):
    def compared(*flags):
        capsys.readouterr()
        return run(monkeypatch, compare, *flags), capsys.readouterr()

    code, shown = compared(finished, finished, "--models", "sft", "base")
    assert code == 0
    mri = shown.out.splitlines()[4].split()
    assert mri[:3] == ["MRI", "8", "100.0"] and int(mri[-3]) + int(mri[-2]) <= 8
    fewer = ("--models", "base", "--test_count", "3", "--out", copied / "out")
    assert run(monkeypatch, evaluate, "--config", copied / "config.toml", *fewer) == 0
    for flags, named in (
        (
            (finished, copied / "out", "--models", "base", "base"),
            "not comparable, different questions (",
        ),
        (
            (finished, finished, "--models", "base", "dpo"),
            "'dpo' has answered 0 of 12 questions; run evaluate.py, or name another model "
            "(base, sft, grpo)",
        ),
        ((finished, copied), "contract.json: not readable"),
    ):
        code, shown = compared(*flags)
        assert code == 2 and shown.err.count("\n") == 1 and named in shown.err


def test_a_test_image_from_training_is_reported_in_the_table_not_refused(
    copied, monkeypatch, capsys
):
    flags = (
        "--models",
        "base",
        "--questions",
        copied / "questions" / "train.json",
        "--out",
        copied / "out",
    )
    assert run(monkeypatch, evaluate, "--config", copied / "config.toml", *flags) == 0
    assert "Of 8 test questions, 8 show a training image" in capsys.readouterr().out


def by_construction(letters: dict[str, list[str | None]], reasoning: list[dict[str, str]]):
    """Rows of four questions whose right answer is A, with these letters under the probes."""
    rows = []
    for i, letter in enumerate(letters["plain"]):
        rows.append(
            {
                "id": f"q{i}",
                "model": "m",
                "modality": "MRI",
                "question_type": "",
                "question": "What?",
                "options": ["knee", "head"],
                "ground_truth": "A",
                "letter": letter,
                "tokens": 9,
                "completion": f"<think>It is the knee.</think><answer>{letter}</answer>",
                "ended": True,
                "reasoning": {"letters": reasoning[i], "swapped": "B"},
                **{probe: {"letter": letters[probe][i]} for probe in letters if probe != "plain"},
            }
        )
    return rows


FAITHFUL = {"0 %": "B", "25 %": "B", "50 %": "B", "75 %": "A", "100 %": "A", "swapped": "B"}
UNFAITHFUL = dict.fromkeys(FAITHFUL, "A")


def test_probes_distinguish_a_model_that_looks_and_reasons_from_one_that_does_neither():
    looks = {"plain": ["A"] * 4, "permuted options": ["A"] * 4}
    looks |= {probe: ["B"] * 4 for probe in ("blank image", "noise image", "other image")}
    guesses = dict.fromkeys(looks, ["A"] * 4) | {
        "permuted options": ["B"] * 4
    }  # always the first option
    credits = {"chance": [0.5] * 4}
    found = {}
    for name, letters, reasoning in (("good", looks, FAITHFUL), ("bad", guesses, UNFAITHFUL)):
        made = by_construction(letters, [reasoning] * 3 + [{}])
        audited = {row["check"]: (row["count"], row["of"]) for row in faithfulness_rows("m", made)}
        (row,) = accuracy_rows("m", made, credits | ablated_credits(made))
        found[name] = {
            "changes early": [x["changed"] for x in early_answering(made)],
            "without reasoning": audited["answer stays without the reasoning"],
            "swapped": audited["answer stays with swapped reasoning"],
            "follows": audited["answer follows swapped reasoning"],
            "order": audited["answer changes with the order of options"],
            "image": audited["answer stays without the image"],
            "best": (row["best_blind"], row["best_blind_rate"]),
        }
    assert found["good"] == {
        "changes early": [1.0, 1.0, 1.0, 0.0, 0.0],
        "without reasoning": (0, 3),
        "swapped": (0, 3),
        "follows": (3, 3),
        "order": (0, 4),
        "image": (0, 4),
        "best": ("chance", 0.5),
    }
    assert found["bad"] == {
        "changes early": [0.0] * 5,
        "without reasoning": (3, 3),
        "swapped": (3, 3),
        "follows": (0, 3),
        "order": (4, 4),
        "image": (4, 4),
        "best": ("blank image", 1.0),
    }


def test_pairs_count_the_questions_that_only_one_of_two_models_answered_right():
    letters = {
        probe: ["A"] * 4
        for probe in ("blank image", "noise image", "other image", "permuted options")
    }
    first = by_construction(letters | {"plain": ["A", "A", "A", "B"]}, [{}] * 4)
    second = by_construction(letters | {"plain": ["A", "B", None, "A"]}, [{}] * 4)
    (row,) = pair_rows({"base": second, "grpo": first})
    assert (row["first"], row["second"], row["only_first"], row["only_second"]) == (
        "grpo",
        "base",
        2,
        1,
    )
    assert row["p"] == pytest.approx(1.0)


def test_samples_give_the_mean_pass_at_k_and_the_majority():
    rows = [
        {"modality": "MRI", "ground_truth": "A", "draws": {"letters": letters}}
        for letters in (["A", "A", "B", None], ["B", "B", "B", "A"])
    ]
    (row,) = sample_rows("m", rows, "draws")
    assert (row["mean"], row["pass_at_k"], row["majority"]) == (3 / 8, 1.0, 0.5)
    assert (
        majority_credit(["A", "B", None, None], "B") == 0.5 and majority_credit([None], "A") == 0.0
    )


def test_samples_do_not_depend_on_the_batch_size(copied, monkeypatch):
    letters = []
    for size in (2, 40):
        out = copied / str(size)
        flags = ("--models", "base", "--samples", "4", "--out", out, "--eval_batch_prompts", size)
        assert run(monkeypatch, evaluate, "--config", copied / "config.toml", *flags) == 0
        letters.append(
            {
                r["id"]: r["letters"]
                for r in rows(out / "probes.jsonl")
                if r["probe"] == "4 samples at 1, seed 0"
            }
        )
    assert letters[0] == letters[1] and len(letters[0]) == 12


def test_a_killed_evaluation_resumes_its_samples_and_another_temperature_samples_again(
    copied, monkeypatch
):
    def drawn():
        found = rows(copied / "out" / "probes.jsonl")
        return {(r["probe"], r["id"]): r["letters"] for r in found if "samples" in r["probe"]}

    flags = (
        "--models",
        "base",
        "--samples",
        "4",
        "--out",
        copied / "out",
        "--config",
        copied / "config.toml",
    )
    assert run(monkeypatch, evaluate, *flags) == 0
    whole = drawn()
    kept = [
        line for line in (copied / "out" / "probes.jsonl").read_text().splitlines(keepends=True)
    ]
    torn = [
        line for line in kept if "samples" not in line or json.loads(line)["place"] in (3, 4, 9)
    ]
    (copied / "out" / "probes.jsonl").write_text("".join(torn))
    assert run(monkeypatch, evaluate, *flags) == 0
    assert drawn() == whole
    calls, real = [], answers.sample_groups
    monkeypatch.setattr(
        answers, "sample_groups", lambda *a, **k: calls.append(k["temperature"]) or real(*a, **k)
    )
    assert run(monkeypatch, evaluate, *flags, "--seed", "0") == 0 and calls == []
    (copied / "config.toml").write_text(
        (copied / "config.toml").read_text() + "temperature = 5.0\n"
    )
    assert run(monkeypatch, evaluate, *flags) == 0
    assert set(calls) == {5.0} and len(drawn()) == 24


def written(name: str, content: str | bytes):
    """Spoils a run: writes `content` to the file `name`."""

    def spoil(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def changed(name: str, old: str, new: str, source: str = ""):
    """Spoils a run: replaces `old` by `new` in the file `name`, or in a copy of `source`."""

    def spoil(folder: Path) -> None:
        text = (folder / (source or name)).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return spoil


def shortened(name: str, size: int):
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return spoil


def removed(name: str):
    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return spoil


BAD_INPUTS = {
    "malformed predictions": (
        written("run/eval/predictions.jsonl", "hello\n"),
        "predictions.jsonl line 1: not JSON",
    ),
    "another contract": (
        written("run/eval/contract.json", '{"parser": "0"}'),
        "not comparable, different prompt",
    ),
    "a contract of the wrong type": (
        written("run/eval/contract.json", "[3]"),
        "contract.json: not readable",
    ),
    "missing image": (removed("questions/9.png"), "9.png"),
    "a text as an image": (written("questions/9.png", "hello"), "9.png: not a readable image"),
    "no such questions": (removed("questions/test.json"), "test.json"),
    "an empty subset": (
        changed("config.toml", "test_questions = [", "test_questions = [] # ["),
        "there are no test questions",
    ),
    "no model": (removed("run_sft/model"), "sft: there is no model"),
    "a folder without a config": (
        removed("run/model/config.json"),
        "config.json: no such file",
    ),
    "torn weights": (
        written("run/model/model.safetensors", b"x" * 100),
        "not a whole safetensors file",
    ),
    "another seed, which draws different questions": (
        changed("run/config.toml", "seed = 0", "seed = 3"),
        "grpo: not comparable, trained with seed 3",
    ),
    "torn metrics": (
        written("run/metrics.jsonl", '{"step": 0}\n[1]\n'),
        "metrics.jsonl line 2: not the numbers",
    ),
    "a truncated image": (shortened("questions/9.png", 2500), "9.png"),
    "an eval folder that is a file": (written("run/eval", ""), "run/eval: File exists"),
    "another chat template": (
        changed("run/model/chat_template.jinja", "helpful", "useful", "base/chat_template.jinja"),
        "grpo: not comparable, the chat template",
    ),
    "a run on other questions": (
        changed("run_sft/config.toml", "train.json", "other.json"),
        "sft: not comparable, trained with train_questions",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_that_names_the_thing_with_exit_code_2(
    copied, monkeypatch, capsys, case
):
    spoil, named = BAD_INPUTS[case]
    spoil(copied)
    capsys.readouterr()
    assert run(monkeypatch, evaluate, "--config", copied / "config.toml") == 2
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in errors if line.startswith("evaluate.py: ")]
    assert len(lines) == 1 and named in lines[0] and "Traceback" not in "".join(errors), errors


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--config FILE is missing"),
        (["--config", "CONFIG", "--models", "dpo"], "'dpo' is unknown"),
        (["--config", "CONFIG", "--samples", "-1"], "--samples is -1"),
        (["--config", "CONFIG", "--device", "cuda:9"], "no such CUDA GPU"),
        (["--config", "CONFIG", "--options", "a", "b"], "need --ask"),
        (
            ["--ask", "What?", "--model", "BASE", "--options", "a", "b", "--samples", "3"],
            "leave out --samples",
        ),
        (["--ask", "What?", "--config", "CONFIG", "--options", "a", "b"], "leave out --config"),
        (["--ask", "What?", "--model", "BASE", "--options", "one"], "--options holds 1"),
        (["--ask", "What?", "--options", "a", "b"], "--ask needs a model"),
        (["--ask", " ", "--model", "BASE", "--options", "a", "b"], "must not be empty"),
        (["--ask", "What?", "--model", "nowhere", "--options", "a", "b"], "nowhere"),
        (
            ["--ask", "What?", "--model", "BASE", "--options", "a", "b", "--image", "none.png"],
            "none.png",
        ),
    ],
)
def test_wrong_flags_are_one_line(trained, monkeypatch, capsys, flags, named):
    places = {"CONFIG": trained / "config.toml", "BASE": trained / "base"}
    assert run(monkeypatch, evaluate, *(places.get(flag, flag) for flag in flags)) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and named in errors


def test_ask_prints_reasoning_answer_letters_and_a_notice(trained, monkeypatch, capsys):
    flags = ("--max_new_tokens", "10", "--image", trained / "questions" / "9.png")
    options = ("Mass", "Normal\x1b[31m")
    flags += ("--model", trained / "run_sft" / "model", "--options", *options)
    assert run(monkeypatch, evaluate, "--ask", "What is seen?", *flags) == 0
    shown = capsys.readouterr().out
    assert "<answer>B</answer>" in shown.splitlines()[0] and shown.count("<answer>") == 1
    letters = {
        line.split()[0]: float(line.split()[1])
        for line in shown.splitlines()
        if line.startswith("  ")
    }
    assert letters.keys() == {"A", "B"} and letters["A"] < letters["B"] <= 0
    assert 0 < math.exp(letters["A"]) + math.exp(letters["B"]) <= 1.0001
    assert "not for diagnosis" in shown and "\x1b" not in shown and "\\x1b[31m" in shown
