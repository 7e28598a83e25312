"""Accuracy with intervals, and the picture of a run."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from data import Question
from evaluation import curves
from evaluation.accuracy import Accuracy, accuracy_by_modality, comparison_table, run_summary
from evaluation.curves import curves_svg


def question(modality: str, answer: str, options: int) -> Question:
    return Question((), "What?", ("x",) * options, answer, modality, "", "row")


QUESTIONS = [question("CT", "A", 2), question("MRI", "B", 4), question("CT", "B", 4)]
ANSWERS = ["<think>x</think><answer>A</answer>", "<think>x</think><answer>B) mass</answer> so", "B"]


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_interval_is_wilsons_as_in_the_textbooks(right, total, low, high):
    assert Accuracy(total, right, 0, 0.0).interval() == pytest.approx((low, high), abs=1e-4)


def test_tallies_count_lenient_letters_and_strict_formats_by_modality():
    tallies = accuracy_by_modality(QUESTIONS, ANSWERS)
    assert list(tallies) == ["CT", "MRI"]
    assert tallies["CT"] == Accuracy(total=2, right=1, formatted=1, expected=0.75)
    assert tallies["MRI"] == Accuracy(total=1, right=1, formatted=0, expected=0.25)


def test_summary_and_table_tell_before_from_after():
    before, after = accuracy_by_modality(QUESTIONS, ["", "", ""]), accuracy_by_modality(QUESTIONS, ANSWERS)
    summary = run_summary(before, after, steps=3)
    assert summary["before"] == {"CT": 0.0, "MRI": 0.0} and summary["after"] == {"CT": 0.5, "MRI": 1.0}
    assert summary["questions"] == {"CT": 2, "MRI": 1} and summary["chance"] == {"CT": 0.375, "MRI": 0.25}
    assert summary["format_after"] == {"CT": 0.5, "MRI": 0.0} and summary["steps"] == 3
    row = comparison_table(before, after).splitlines()[1]
    assert row.split()[:4] == ["CT", "2", "37.5", "0.0"] and "50.0 ( 9.5 to  90.5)" in row and "0 -> 50 %" in row


@pytest.mark.parametrize("kl", [{}, {"kl": 0.0}, {"kl": 3.7}])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_curves_are_well_formed_whatever_the_run(kl, count):
    row = {"reward": 1.7, "rewards/format": 1.0, "rewards/accuracy": 0.7, "completion_tokens": 13.4} | kl
    root = ElementTree.fromstring(curves_svg([{"step": step} | row for step in range(count)]))
    numbers = [
        float(x)
        for line in root.iter("{http://www.w3.org/2000/svg}polyline")
        for x in line.get("points").replace(",", " ").split()
    ]
    assert len(numbers) == 5 * 2 * count and all(0 <= x <= 400 for x in numbers)


def test_curves_of_a_run_that_has_none_is_one_line(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "curves.svg"
    (tmp_path / "metrics.jsonl").write_text("")
    for folder, named in ((tmp_path, "no steps yet"), (tmp_path / "none", "none")):
        monkeypatch.setattr(sys, "argv", ["curves", str(folder), str(picture)])
        assert curves.main() == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and named in errors
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward": 1.0}) + "\n")
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path), str(picture)])
    assert curves.main() == 0
    assert picture.read_text().startswith("<svg")
