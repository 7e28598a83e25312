"""Blind baselines: their credits by hand and on the published question files."""

import json
import sys
from pathlib import Path

import pytest

from common.errors import printable
from data import Question, read_questions
from evaluation.audits import blind
from evaluation.audits.blind import blind_credits, by_modality, plain_text
from evaluation.statistics import percent

RADIOLOGY = Path(__file__).parents[2] / "shared" / "radiology"
TRAIN, TEST = (
    RADIOLOGY / "omnimedvqa_mri_questions.json",
    RADIOLOGY / "medvlm_r1_test_questions.json",
)
published = pytest.mark.skipif(
    not (TRAIN.is_file() and TEST.is_file()),
    reason="the published question files are not beside the repository",
)


def question(options, answer, modality="MRI"):
    return Question((), "What?", tuple(options), answer, modality, "", "row")


def credit(name, train, test):
    [value] = blind_credits(train, [test])[name]
    return value


def test_chance_depends_on_the_number_of_options():
    assert blind_credits([], [question("ab", "A"), question("abcd", "D")])["chance"] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("letters", "options", "answer", "expected"),
    [
        ("BBA", "abcd", "B", 1),
        ("BBA", "abcd", "A", 0),
        ("DDA", "abc", "A", 1),  # a letter without an option is not chosen
        ("AABB", "abcd", "B", 0.5),
        ("AABB", "abcd", "C", 0),
        ("DD", "abc", "C", 1 / 3),
    ],
)
def test_letter_is_the_most_frequent_among_those_of_the_question(
    letters, options, answer, expected
):
    train = [question("abcd", letter) for letter in letters]
    assert credit("most_frequent_letter", train, question(options, answer)) == pytest.approx(
        expected
    )


TRAINING = [
    question(["mass", "cyst"], "A"),
    question(["cyst", "mass", "clear"], "B"),
    question(["clear", "cyst"], "A"),
    question(["lung", "clear"], "A"),
    question(["lung", "spine"], "B"),
    question(["spine", "rib"], "A"),
]


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["clear", "mass"], "B", 1),  # right twice, against once
        (["clear", "mass"], "A", 0),
        (["clear", "lung"], "A", 0.5),  # right once each, however often they were wrong
        (["clear", "lung"], "B", 0.5),
        (["clear", "lung", "cyst"], "C", 0),
        (["cyst", "never"], "A", 0.5),  # neither ever right
        (["never", "nowhere", "rib"], "A", 1 / 3),  # and the first has no advantage
        (["cyst", "  MASS. "], "B", 1),  # the same words
        (["mass", "Mass", "cyst"], "A", 0.5),  # the same words twice
        (["mass", "Mass", "cyst"], "B", 0.5),
    ],
)
def test_text_prior_goes_by_right_answers_and_texts_that_tie_share_the_credit(
    options, answer, expected
):
    assert credit("text_prior", TRAINING, question(options, answer)) == expected


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["a", "b.", "c", "d"], "B", 1),
        (["a", "b.", "c", "d"], "A", 0),
        (["a.", "b.", "c", "d."], "C", 1),
        (["a.", "b.", "c", "d"], "C", 0.25),
        (["a", "b", "c"], "C", 1 / 3),
        (["a.", "b."], "A", 0.5),
        (["a.", "b"], "A", 0.5),  # of two, neither is odd
    ],
)
def test_punctuation_takes_the_odd_one_out(options, answer, expected):
    assert credit("punctuation", [], question(options, answer)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "options", "answer", "expected"),
    [
        ("BBA", ["a", "bbb", "cc"], "B", 1),
        ("AAB", ["a", "bbb", "cc"], "A", 1),
        ("AAB", ["a", "bbb", "cc"], "B", 0),
        ("BB", ["a", "bb", "cc"], "C", 0.5),
        ("AA", ["a", "bb", "c"], "C", 0.5),
    ],
)
def test_length_prefers_the_direction_that_was_right_more_often(answers, options, answer, expected):
    train = [question(["x", "xxxx"], letter) for letter in answers]
    assert credit("length", train, question(options, answer)) == expected


def test_fitting_never_sees_the_test_questions():
    test = [question(["rib", "spine"], "B"), question(["spine", "rib"], "A")]
    assert blind_credits(TRAINING, test)["text_prior"] == [1, 1]
    assert [credit("text_prior", TRAINING, each) for each in test] == [1, 1]
    assert blind_credits([], test)["text_prior"] == [0.5, 0.5]


def test_means_are_by_modality_and_baseline():
    test = [
        question(["mass", "rib"], "A", "CT"),
        question("abcd", "A", "MRI"),
        question(["rib", "a", "b", "c"], "B", "CT"),
    ]
    means = by_modality(test, blind_credits(TRAINING, test))
    assert list(means) == ["chance", "most_frequent_letter", "text_prior", "punctuation", "length"]
    assert means["chance"] == {"CT": 0.375, "MRI": 0.25}
    assert means["text_prior"] == {"CT": 0.625, "MRI": 0.25}


def test_texts_are_compared_by_their_words():
    assert plain_text(" Lung  Cancer. ") == plain_text("lung cancer") != plain_text("lung, cancer")


def test_control_characters_are_escaped_for_the_terminal():
    assert printable("Müller\x1b[2J\n\u202e") == "Müller\\x1b[2J\\n\\u202e"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["blind", *map(str, arguments)])
    return blind.main()


def test_command_prints_one_json_object_without_any_image(tmp_path, monkeypatch, capsys):
    row = {
        "image": ["gone.png"],
        "question": "What?",
        "options": ["cyst", "mass"],
        "answer": "mass",
    }
    for name, modality in (("a", "CT"), ("b", "PET\x1b")):
        (tmp_path / f"{name}.json").write_text(json.dumps([row | {"modality": modality}]))
    files = tmp_path / "a.json", tmp_path / "b.json"
    assert run(monkeypatch, "--train", *files, "--test", *files) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["text_prior"] == {"CT": 1, "PET\x1b": 1}
    assert "\x1b" not in printed.out and printed.err == ""


def test_command_reports_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "none\x1b.json"
    assert run(monkeypatch, "--train", file, "--test", file) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("blind: ") and printed.out == ""
    assert printed.err.rstrip("\n").isprintable()


@published
def test_text_alone_answers_the_published_mri_questions(monkeypatch, capsys):
    assert run(monkeypatch, "--train", TRAIN, "--test", TEST) == 0
    rates = json.loads(capsys.readouterr().out)["text_prior"]
    percents = {modality: percent(rate) for modality, rate in rates.items()}
    assert percents == {"MRI": "98.9", "CT": "33.5", "X-ray": "26.0"}


@published
def test_a_lone_full_stop_marks_the_published_answers():
    test = read_questions(TEST, check_images=False)
    lone = [
        q
        for q in test
        if len(q.options) == 4 and sum(option.endswith(".") for option in q.options) == 1
    ]
    assert len(lone) == 102 and sum(blind_credits([], lone)["punctuation"]) == 100
