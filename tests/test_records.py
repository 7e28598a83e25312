"""An evaluation's rows on disk, and the contract that decides which results are comparable."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import tiny_model, write_run

from common.config import load_config
from common.errors import InputError
from data import Question, load_vocabulary, read_questions
from data.choice import prompt_encoder
from evaluation.contract import contract, refuse_unlike
from evaluation.models import model_digest, model_folders, results_folder, usual_models
from evaluation.records import Records
from model import read_config, save_model

WEIGHTS = {"base": "w0", "grpo": "w1"}


TERMS = {"hash": "c"}


def questions(count: int) -> list[Question]:
    return [Question((), "What?", ("x", "y"), "B", "MRI", "", f"q{i}") for i in range(count)]


def opened(folder: Path, count: int = 1, digests: dict[str, str] = WEIGHTS) -> Records:
    return Records(folder, TERMS, digests, questions(count))


ANSWER = {
    "modality": "MRI",
    "question_type": "",
    "question": "What?",
    "options": ["x", "y"],
    "ground_truth": "B",
    "completion": "B",
    "letter": "B",
    "tokens": 2,
    "ended": True,
    "rewards": {},
}


def test_rows_survive_a_kill_but_a_torn_last_row_is_dropped(tmp_path):
    records = opened(tmp_path, 3)
    assert records.missing("grpo", "plain") == [0, 1, 2]
    records.add("grpo", "plain", 0, ANSWER)
    records.add("base", "plain", 0, ANSWER)
    records.add("grpo", "plain", 2, ANSWER)
    records.add("grpo", "blank image", 1, {"letter": None})
    file = tmp_path / "predictions.jsonl"
    whole = file.read_bytes()
    assert whole.count(b"\n") == 3 and (tmp_path / "probes.jsonl").read_bytes().count(b"\n") == 1
    file.write_bytes(whole + '{"model": "grpo", "pro: é'.encode()[:-1])
    records = opened(tmp_path, 3)
    assert records.missing("grpo", "plain") == [1]
    assert records.missing("grpo", "blank image") == [0, 2]
    row = {"model": "grpo", "probe": "plain", "id": "q2", "place": 2, **ANSWER}
    assert records.rows["grpo", "plain", 2] == row | {"contract": "c", "digest": "w1"}
    assert file.read_bytes() == whole


def test_rows_of_a_retrained_model_are_dropped_and_counted_and_others_stay(tmp_path):
    records = opened(tmp_path, 2)
    for model, place in (("grpo", 0), ("base", 0), ("base", 1), ("grpo", 1)):
        records.add(model, "plain", place, ANSWER)
    records = opened(tmp_path, 2, {"grpo": "w2"})
    assert records.dropped == 2
    assert records.missing("grpo", "plain") == [0, 1] and records.missing("base", "plain") == []


def test_text_that_utf8_can_not_hold_is_read_back_unchanged(tmp_path):
    text = "\ud800 \u2028 \x00 é <script>"
    records = opened(tmp_path)
    records.add("grpo", "plain", 0, ANSWER | {"completion": text})
    records = opened(tmp_path)
    assert records.of("grpo")[0]["completion"] == text


ROW = {
    "model": "grpo",
    "probe": "blank image",
    "id": "q0",
    "place": 0,
    "letter": "A",
    "contract": "c",
    "digest": "w1",
}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("hello", "line 2: not JSON"),
        ("[1]", "line 2: not a row"),
        ("{}", "line 2: not a row"),
        (json.dumps(ROW | {"model": 3}), "line 2: not a row of an evaluation, `model` is"),
        (json.dumps(ROW | {"probe": "plain"}), "`ground_truth` is missing or of the wrong type"),
        (json.dumps(ROW | ANSWER | {"probe": "plain", "modality": [1]}), "`modality` is missing"),
        ("\udcff", "line 2: not JSON"),
        ("[" * 100000, "line 2: not JSON"),
        (json.dumps(ROW | {"contract": "d"}), "rows with another contract"),
    ],
)
def test_a_malformed_row_is_a_one_line_error_and_nothing_is_lost(tmp_path, line, named):
    records = opened(tmp_path)
    records.add("grpo", "plain", 0, ANSWER)
    file = tmp_path / "predictions.jsonl"
    text = file.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n"
    file.write_bytes(text)
    with pytest.raises(InputError, match=named) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))
    assert file.read_bytes() == text


@pytest.fixture
def made(tmp_path):
    config = load_config(write_run(tmp_path))
    shape = read_config(config.model)
    encoder = prompt_encoder(load_vocabulary(config.model, shape), shape, config)
    return config, encoder, read_questions(config.test_questions[0])


def test_a_contract_depends_on_its_terms_only_and_a_refusal_names_those_that_differ(made):
    config, encoder, questions = made
    ours = contract(config, encoder, questions)
    assert contract(replace(config, run_dir="elsewhere", seed=3), encoder, list(questions)) == ours
    refuse_unlike(ours, dict(ours), "there")
    changed = {
        "max_new_tokens": contract(replace(config, max_new_tokens=11), encoder, questions),
        "max_pixels": contract(replace(config, max_pixels=5000), encoder, questions),
        "questions": contract(config, encoder, questions[1:]),
        "parser": ours | {"parser": "0"},
    }
    for name, theirs in changed.items():
        with pytest.raises(InputError, match=f"there: not comparable, different {name} ") as caught:
            refuse_unlike(ours, theirs, "there")
        assert "hash" not in str(caught.value)
    with pytest.raises(InputError, match="not comparable"):
        refuse_unlike(ours, {}, "there")


def test_the_contract_depends_on_images_and_questions_not_on_their_paths(made, tmp_path):
    config, encoder, questions = made
    before = contract(config, encoder, questions)["questions"]
    moved = tmp_path / "moved"
    (tmp_path / "questions").rename(moved)
    again = read_questions(moved / "test.json")
    assert contract(config, encoder, again)["questions"] == before
    image = again[0].images[0]
    image.write_bytes(again[1].images[0].read_bytes())
    assert contract(config, encoder, again)["questions"] != before


def test_the_model_digest_changes_with_the_weights(tmp_path):
    for seed in (0, 1):
        save_model(tiny_model(seed), tmp_path / str(seed))
    save_model(tiny_model(0), tmp_path / "again")
    digests = [model_digest(tmp_path / name) for name in ("0", "1", "again")]
    assert digests[0] == digests[2] != digests[1]


def test_only_the_full_evaluation_goes_to_eval():
    assert results_folder("run", ["base", "sft", "grpo"], []) == Path("run/eval")
    assert results_folder("run", ["base"], []) == Path("run/eval-base")
    assert results_folder("run", ["base", "sft", "grpo"], ["x/ct.json", "mri.json"]) == Path(
        "run/eval-ct-mri"
    )


def test_models_are_found_by_name_and_incomparable_runs_are_refused(tmp_path):
    config = load_config(write_run(tmp_path))
    trained = {}
    run_dir = str(tmp_path / "run")
    assert usual_models(run_dir) == ["base", "sft", "grpo"]
    text = (tmp_path / "config.toml").read_text()
    own = {"run": "", "run_sft": 'method = "sft"\n', "run_blind": 'images = "noise"\n'}
    for name, line in own.items():
        (tmp_path / name / "model").mkdir(parents=True)
        trained[name] = tmp_path / name / "config.toml"
        trained[name].write_text(text + line)
    assert usual_models(run_dir + "/") == ["base", "sft", "blind", "grpo"]
    folders = model_folders(config, ["base", "sft", "blind", "grpo", "mine=" + str(tmp_path)])
    assert folders == {
        "base": tmp_path / "base",
        "sft": tmp_path / "run_sft" / "model",
        "blind": tmp_path / "run_blind" / "model",
        "grpo": tmp_path / "run" / "model",
        "mine": tmp_path,
    }
    trained["run_sft"].write_text(trained["run_sft"].read_text() + "max_pixels = 5000\n")
    trained["run"].write_text(trained["run"].read_text() + 'method = "sft"\n')
    trained["run_blind"].write_text(text)
    for names, named in (
        (["grpo"], "grpo: .*config.toml has method = 'sft'"),
        (["blind"], "blind: .*has method = 'grpo' and images = 'own'"),
        (["\x1b[31m=" + str(tmp_path)], "is invalid or given twice"),
        (["=" + str(tmp_path)], "is invalid or given twice"),
        (["sft"], "sft: not comparable, trained with max_pixels 5000"),
        (["dpo"], "'dpo' is unknown"),
        (["base", "base"], "is invalid or given twice"),
        (["x=nowhere"], "x: there is no model in nowhere"),
    ):
        with pytest.raises(InputError, match=named):
            model_folders(config, names)
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="grpo: there is no model in .*make train"):
        model_folders(config, ["grpo"])
