"""What an evaluation keeps on disk, and the contract that says which results may be compared."""

from dataclasses import replace

import pytest
from tiny_run import tiny_model, write_run

from common.config import load_config
from common.errors import InputError
from data import load_vocabulary, read_questions
from data.choice import prompt_encoder
from evaluation.contract import contract, refuse_unlike
from evaluation.models import model_digest, model_folders
from evaluation.records import Records
from model import read_config, save_model

WEIGHTS = {"base": "w0", "grpo": "w1"}


def row(model="grpo", place=0, **fields):
    return {
        "model": model,
        "probe": "plain",
        "id": f"q{place}",
        "place": place,
        "letter": "B",
        **fields,
    }


def test_rows_come_back_after_a_kill_and_a_torn_last_row_does_not(tmp_path):
    file = tmp_path / "rows.jsonl"
    with Records(file, "c", WEIGHTS) as records:
        assert records.missing("grpo", "plain", 2) == [0, 1]
        records.add([row(), row("base"), row(place=2)])
    whole = file.read_bytes()
    file.write_bytes(whole + '{"model": "grpo", "pro: é'.encode()[:-1])
    with Records(file, "c", WEIGHTS) as records:
        assert records.missing("grpo", "plain", 3) == [1]
        assert records.rows["grpo", "plain", 2] == row(place=2) | {"contract": "c", "digest": "w1"}
    assert file.read_bytes() == whole


def test_rows_of_a_model_trained_anew_are_dropped_and_counted_and_others_stay(tmp_path):
    with Records(tmp_path / "rows", "c", WEIGHTS) as records:
        records.add([row(), row("base"), row("grpo", 1)])
    with Records(tmp_path / "rows", "c", {"grpo": "w2"}) as records:
        assert records.dropped == 2
        assert (
            records.missing("grpo", "plain", 1) == [0] and records.missing("base", "plain", 1) == []
        )


def test_text_that_utf8_can_not_hold_comes_back_as_it_was(tmp_path):
    text = "\ud800 \u2028 \x00 é <script>"
    with Records(tmp_path / "rows", "c", WEIGHTS) as records:
        records.add([row(completion=text)])
    with Records(tmp_path / "rows", "c", WEIGHTS) as records:
        assert records.of("grpo", "plain", 1)[0]["completion"] == text


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("hello", "line 2: not a row"),
        ("[1]", "line 2: not a row"),
        ("{}", "line 2: not a row"),
        (
            '{"model": 3, "probe": "p", "id": "q", "place": 1, "contract": "c", "digest": "w", "letter": null}',
            "wrong type",
        ),
        (
            '{"model": "grpo", "probe": "p", "id": "q", "place": 1, "contract": "c", "digest": "w1"}',
            "is missing",
        ),
        ("\udcff", "line 2: not a row"),
        ("[" * 100000, "line 2: not a row"),
        (
            '{"model": "grpo", "probe": "p", "id": "q", "place": 1, "contract": "d", "digest": "w1", "letter": "A"}',
            "rows under another contract",
        ),
    ],
)
def test_a_row_that_is_none_is_one_line_and_nothing_is_lost(tmp_path, line, named):
    with Records(tmp_path / "rows", "c", WEIGHTS) as records:
        records.add([row()])
    text = (tmp_path / "rows").read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n"
    (tmp_path / "rows").write_bytes(text)
    with pytest.raises(InputError, match=named) as caught:
        Records(tmp_path / "rows", "c", WEIGHTS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))
    assert (tmp_path / "rows").read_bytes() == text


@pytest.fixture
def made(tmp_path):
    config = load_config(write_run(tmp_path))
    shape = read_config(config.model)
    encoder = prompt_encoder(load_vocabulary(config.model, shape), shape, config)
    return config, encoder, read_questions(config.test_questions[0])


def test_a_contract_is_the_same_for_the_same_and_names_what_differs(made, tmp_path):
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
        with pytest.raises(
            InputError, match=f"there: not comparable, because of another {name} "
        ) as caught:
            refuse_unlike(ours, theirs, "there")
        assert "hash" not in str(caught.value)
    with pytest.raises(InputError, match="not comparable"):
        refuse_unlike(ours, {}, "there")


def test_the_contract_knows_what_is_seen_and_asked_not_where_it_lies(made, tmp_path):
    config, encoder, questions = made
    before = contract(config, encoder, questions)["questions"]
    moved = tmp_path / "moved"
    (tmp_path / "questions").rename(moved)
    again = read_questions(moved / "test.json")
    assert contract(config, encoder, again)["questions"] == before
    image = again[0].images[0]
    image.write_bytes(again[1].images[0].read_bytes())
    assert contract(config, encoder, again)["questions"] != before


def test_weights_have_another_digest_once_they_change(tmp_path):
    for seed in (0, 1):
        save_model(tiny_model(seed), tmp_path / str(seed))
    save_model(tiny_model(0), tmp_path / "again")
    digests = [model_digest(tmp_path / name) for name in ("0", "1", "again")]
    assert digests[0] == digests[2] != digests[1]


def test_models_are_found_by_name_and_unlike_runs_are_refused(tmp_path):
    config = load_config(write_run(tmp_path))
    trained = {}
    for name in ("run", "run_sft"):
        (tmp_path / name / "model").mkdir(parents=True)
        trained[name] = tmp_path / name / "config.toml"
        method = 'method = "sft"\n' if name == "run_sft" else ""
        trained[name].write_text((tmp_path / "config.toml").read_text() + method)
    folders = model_folders(config, ["base", "sft", "grpo", "mine=" + str(tmp_path)])
    assert folders == {
        "base": tmp_path / "base",
        "sft": tmp_path / "run_sft" / "model",
        "grpo": tmp_path / "run" / "model",
        "mine": tmp_path,
    }
    trained["run_sft"].write_text(trained["run_sft"].read_text() + "max_pixels = 5000\n")
    trained["run"].write_text(trained["run"].read_text() + 'method = "sft"\n')
    for names, named in (
        (["grpo"], "grpo: .*config.toml is of a run by sft"),
        (["\x1b[31m=" + str(tmp_path)], "is no name"),
        (["=" + str(tmp_path)], "is no name"),
        (["sft"], "sft: not comparable, trained with max_pixels 5000"),
        (["dpo"], "'dpo' is unknown"),
        (["base", "base"], "given twice"),
        (["x=nowhere"], "x: there is no model in nowhere"),
        ([], "names none"),
    ):
        with pytest.raises(InputError, match=named):
            model_folders(config, names)
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="grpo: there is no model in .*make train"):
        model_folders(config, ["grpo"])
