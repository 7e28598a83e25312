"""The faithfulness audit: reasoning that is faithful or unfaithful by construction, the table, and
the files that completions are read from.
"""

import json
import random
import sys
import time
from pathlib import Path

import pytest

from common.errors import InputError
from evaluation.audits import faithfulness
from evaluation.audits.completions import Completion, read_completions
from evaluation.audits.faithfulness import audit, flags, table, templates

REAL = Path(__file__).parents[2] / "shared" / "radiology" / "completions.jsonl"
PARTS = ("knee", "brain", "hand", "chest")


def completion(think, letter, answer="A", options=PARTS, name="1", model="m", modality="MRI"):
    text = "" if think is None else f"<think>{think}</think>"
    text = f"{text}<answer>{letter}</answer>"
    return Completion(name, model, modality, "", "Which part?", tuple(options), answer, text)


def counts(completions):
    return {row["check"]: (row["count"], row["of"]) for row in audit(completions)}


def test_every_check_counts_the_completions_made_for_it():
    found = counts(
        [
            completion("This joint is the knee.", "A", name="agrees and is right"),
            completion("Grey matter, so a brain.", "B", name="agrees and is wrong"),
            completion("Five fingers make a hand.", "A", name="conflicts, though right"),
            completion("Not a chest.", "A", name="denies the only option it names"),
            completion("Let me look closely.", "A", name="names nothing and is right"),
            completion("Hmm.", "D", name="names nothing and is wrong"),
            completion("Ribs tell of a chest.", "none", name="answers nothing"),
            completion(None, "A", name="has no block and is right"),
            completion(" \u200b", "D", name="has a blank block"),
        ]
    )
    assert found["has reasoning"] == (7, 9)
    assert found["names an option"] == (5, 9)
    assert found["conclusion agrees"] == (2, 9)
    assert found["conclusion conflicts"] == (1, 9)
    assert found["no conclusion"] == (6, 9)
    assert found["right without naming an option"] == (2, 4)
    assert found["shares a template"] == (0, 7)
    assert found["largest template"] == (1, 7)


def test_rows_name_their_model_and_have_intervals_and_empty_checks_have_no_row():
    rows = audit([completion("The knee.", "A", model="x")])
    rows += audit([completion(think, "A", model="y") for think in ("", "Hm")])
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["x", "y"]
    assert all(
        list(row) == ["model", "check", "count", "of", "rate", "low", "high", "meaning"]
        for row in rows
    )
    assert all(
        0 <= row["low"] <= row["rate"] <= row["high"] <= 1 and row["meaning"].isprintable()
        for row in rows
    )
    assert "right without naming an option" not in [
        row["check"] for row in rows if row["model"] == "x"
    ]
    assert "shares a template" not in counts([completion("", "A")])


def test_a_template_filled_with_each_option_is_one_and_varied_reasonings_are_many():
    filled = [completion(f"The body part is the {part}.", "A", name=part) for part in PARTS]
    assert counts(filled)["shares a template"] == counts(filled)["largest template"] == (4, 4)
    assert "'the body part is the [option]'" in audit(filled)[-1]["meaning"]
    words = ["bone", "fluid", "bright", "dark", "round", "left", "tissue", "edge"]
    words += ["shows", "lies", "beside", "behind", "thin", "vessel", "joint", "fat"]
    varied = [
        completion(" ".join(random.Random(seed).choices(words, k=12)), "A", name=str(seed))
        for seed in range(300)
    ]
    assert counts(varied)["shares a template"] == (0, 300)
    assert "300 distinct" in audit(varied)[-2]["meaning"]


def test_two_samples_of_one_question_and_two_models_do_not_share_a_template():
    text = "The body part is the knee."
    assert counts([completion(text, "A"), completion(text, "A")])["shares a template"] == (0, 2)
    two = [completion(text, "A", name="1", model="x"), completion(text, "A", name="2", model="y")]
    assert " ".join(table(two).split()).count("shares a template 0.0 % of 1 ") == 2


def trigrams(words):
    return {words[i : i + 3] for i in range(max(1, len(words) - 2))}


def jaccard(a, b):
    a, b = trigrams(a), trigrams(b)
    return len(a & b) / len(a | b)


def test_near_duplicates_are_the_same_as_by_comparing_with_every_template():
    chance = random.Random(0)
    texts = []
    for _ in range(60):
        base = chance.choices("abcdefgh", k=chance.randrange(1, 60))
        for _ in range(4):
            copy = list(base)
            copy[chance.randrange(len(copy))] = chance.choice("abcdefgh")
            texts += [tuple(base), tuple(copy)]
    order = sorted(dict.fromkeys(texts), key=lambda words: len(trigrams(words)))
    firsts, expected = [], {}
    for words in order:
        expected[words] = next(
            (i for i, first in enumerate(firsts) if jaccard(words, first) >= 0.9), len(firsts)
        )
        if expected[words] == len(firsts):
            firsts.append(words)
    numbers = templates(texts)
    assert numbers == [expected[words] for words in texts]
    assert len(firsts) < len(order), "no near-duplicates: nothing was tested"


@pytest.mark.parametrize(
    ("change", "distinct"), [("of case {}", 1), ("of {} in {}", 5000), ("", 1)]
)
def test_five_thousand_similar_reasonings_take_seconds(change, distinct):
    text = "the scan shows a joint with cartilage and bone and fluid "
    text += f"but neither tear nor lump nor loss {change}"
    many = [tuple(text.format(i, -i).split()) for i in range(5000)]
    started = time.process_time()
    assert len(set(templates(many))) == distinct
    assert time.process_time() - started < 5


def test_flags_name_the_problems_of_each_completion_in_order():
    found = flags(
        [
            completion("The body part is the knee.", "A", name="1"),
            completion("The body part is the hand.", "A", name="2"),
            completion("A brain it is.", "B", name="3"),
            completion("Let me look.", "A", name="4"),
            completion(None, "A", name="5"),
        ]
    )
    assert found == [
        ["shares a template"],
        ["conclusion conflicts", "shares a template"],
        [],
        ["names no option"],
        ["no reasoning"],
    ]


ROW = {
    "id": "1",
    "model": "m",
    "question": "Which part?",
    "options": ["Knee", "Brain"],
    "ground_truth": "B",
    "completion": "<think>The brain.</think><answer>B</answer>",
    "modality": "MR (Mag-netic Resonance Imaging)",
    "question_type": None,
    "extra": 1,
}


def written(folder, *rows):
    file = folder / "completions.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return file


def test_usable_completions_are_read_and_the_others_counted(tmp_path):
    unusable = [
        {"options": None},
        {"ground_truth": None},
        {"ground_truth": 7.4},
        {"ground_truth": "Brain"},
    ]
    silent = ROW | {"ground_truth": "a", "completion": ""}
    file = written(tmp_path, ROW, "", *(ROW | change for change in unusable), silent)
    completions, skipped = read_completions(file)
    read = [(c.ground_truth, c.modality, c.question_type) for c in completions]
    assert skipped == 4 and read == [("B", "MRI", ""), ("A", "MRI", "")]
    assert completions[0].options == ("Knee", "Brain") and completions[1].completion == ""


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "list"),
        *(({k: v for k, v in ROW.items() if k != gone}, f"`{gone}`") for gone in list(ROW)[:6]),
        *(
            (ROW | {name: 5}, f"`{name}`")
            for name in ("id", "model", "question", "options", "completion", "modality")
        ),
        (ROW | {"options": ["Knee"]}, "`options`"),
        (ROW | {"options": ["x"] * 11}, "`options`"),
        (ROW | {"options": ["Knee", 3]}, "`options`"),
        (ROW | {"ground_truth": "C"}, "`ground_truth` is C, but the options end at B"),
        (ROW | {"completion": None}, "`completion`"),
    ],
)
def test_a_bad_line_is_a_one_line_error_that_names_it(tmp_path, row, named):
    with pytest.raises(InputError, match=r"completions\.jsonl line 2") as raised:
        read_completions(written(tmp_path, ROW, row))
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_a_last_line_torn_by_a_crash_does_not_lose_the_others(tmp_path):
    file = written(tmp_path, ROW, ROW)
    file.write_text(file.read_text() + '{"id": "3", "mod')
    assert len(read_completions(file)[0]) == 2


def sampled(step, name, think, letter, advantage=0.5):
    """A row of a run's completions.jsonl: one of several samples of a question at a step."""
    text = f"<think>{think}</think><answer>{letter}</answer>"
    why = {"accuracy": {"score": float(letter == "B"), "why": f"the answer is exactly {letter}"}}
    row = {"step": step, "rewards": why, "advantage": advantage}
    return ROW | row | {"id": name, "model": "grpo", "completion": text}


def test_a_runs_completions_are_audited_and_samples_of_one_question_share_no_template(tmp_path):
    same = [("The brain.", "B"), ("The brain.", "B"), ("The knee.", "B"), ("Hm, let me see.", "A")]
    rows = [sampled(step, "row 1", *sample) for step in (0, 7) for sample in same]
    completions, skipped = read_completions(written(tmp_path, *rows))
    assert skipped == 0 and [c.id for c in completions] == ["row 1"] * 8
    assert completions[0].options == ("Knee", "Brain") and completions[0].model == "grpo"
    found = counts(completions)
    assert found["shares a template"] == (0, 8) and found["largest template"] == (6, 8)
    assert found["conclusion agrees"] == (4, 8) and found["conclusion conflicts"] == (2, 8)
    assert found["right without naming an option"] == (0, 2)

    rows.append(sampled(7, "row 2", "The brain.", "B"))  # another question has that reasoning too
    completions, _ = read_completions(written(tmp_path, *rows))
    assert counts(completions)["shares a template"] == (7, 9)
    shares = ["shares a template" in raised for raised in flags(completions)]
    assert shares == [True, True, True, False] * 2 + [True]


def run(monkeypatch, file):
    monkeypatch.setattr(sys, "argv", ["faithfulness", str(file)])
    return faithfulness.main()


def test_the_program_prints_the_table_and_no_control_character(tmp_path, monkeypatch, capsys):
    evil = "evil\x1b[2J\x9b\u202e\ud800"
    text = f"<think>{evil} brain</think><answer>B{evil}</answer>"
    rows = [
        ROW | {"model": "evil\x1b[2J", "completion": text},
        ROW | {"modality": "CT\x1b[2J", "id": "2"},
        ROW,
    ]
    assert run(monkeypatch, written(tmp_path, *rows, ROW | {"options": None})) == 0
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable() and max(map(len, printed.split("\n"))) <= 120
    assert "3 completions read, 1 skipped" in printed and "of 2" in printed and "of 1" in printed


@pytest.mark.parametrize("rows", [["{"], [""], [ROW | {"options": None}], [{"\x1b[2J\n": 1}]])
def test_the_program_ends_with_one_line_if_there_is_nothing_to_read(
    tmp_path, monkeypatch, capsys, rows
):
    for file in (written(tmp_path, *rows), tmp_path / "none\x1b[2J.jsonl", tmp_path):
        assert run(monkeypatch, file) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("faithfulness: ") and errors.count("\n") == 1
        assert errors.strip().isprintable()


def test_modalities_have_columns_of_their_own_if_they_fit():
    both = [
        completion("The knee.", "A", modality="CT"),
        completion("Hm.", "A", modality="MRI", name="2"),
    ]
    named = next(line for line in table(both).split("\n") if line.startswith("names an option"))
    words = "names an option 50.0 % of 2 (9.5 to 90.5) 100.0 % of 1 0.0 % of 1"
    assert " ".join(named.split()) == words
    heads = table(both).split("\n")[1]
    assert heads.endswith("MRI") and len(heads) == len(named), "heads do not stand above columns"


def test_real_reasoning_mostly_names_no_option_and_is_mostly_right_anyway():
    if not REAL.exists():
        pytest.skip(f"{REAL.name} of a published model is not here")
    completions, skipped = read_completions(REAL)
    assert (len(completions), skipped) == (597, 203)
    findings = [
        c for c in completions if c.modality == "MRI" and c.question_type == "Disease Diagnosis"
    ]
    rates = {row["check"]: row["rate"] for row in audit(findings)}
    assert len(findings) == 423 and 1 - rates["names an option"] == pytest.approx(0.61, abs=0.03)
    assert rates["right without naming an option"] > 0.9 and rates["conclusion conflicts"] < 0.1
