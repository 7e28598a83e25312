"""Accuracy with intervals, and a run's training curves."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from data import Question
from evaluation.accuracy import Accuracy, accuracy_by_modality, comparison_table, run_summary
from evaluation.report import curves
from evaluation.report.curves import curves_svg
from evaluation.statistics import binomial_tail, mcnemar, wilson


def question(modality: str, answer: str, options: int) -> Question:
    return Question((), "What?", ("x",) * options, answer, modality, "", "row")


QUESTIONS = [question("CT", "A", 2), question("MRI", "B", 4), question("CT", "B", 4)]
ANSWERS = ["<think>x</think><answer>A</answer>", "<think>x</think><answer>B) mass</answer> so", "B"]
BLIND = {"chance": {"CT": 0.375, "MRI": 0.25}, "length": {"CT": 0.1, "MRI": 0.9}}


@pytest.mark.parametrize("total", [1, 10, 300])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.8, 1.0])
def test_wilson_interval_matches_scipy(total, share):
    stats = pytest.importorskip("scipy.stats")
    right = round(share * total)
    known = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert wilson(right, total) == pytest.approx((known.low, known.high), abs=2e-5)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval_matches_textbook_values(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second"), [(0, 0), (1, 0), (5, 5), (2, 9), (30, 12), (0, 60), (140, 9)]
)
def test_mcnemar_matches_the_exact_two_sided_binomial_test_of_scipy(first, second):
    stats = pytest.importorskip("scipy.stats")
    known = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(known, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (3, 10), (170, 300), (2600, 5000)])
@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 1.0])
def test_binomial_tail_matches_scipy(right, total, chance):
    stats = pytest.importorskip("scipy.stats")
    known = stats.binomtest(right, total, chance, alternative="greater").pvalue
    assert binomial_tail(right, total, chance) == pytest.approx(known, rel=1e-6, abs=1e-300)


def test_mcnemar_by_hand():
    assert mcnemar(0, 6) == pytest.approx(2 / 64)  # six coins that all show heads, or all tails


def test_tallies_count_lenient_letters_strict_letters_and_the_format_apart():
    tallies = accuracy_by_modality(QUESTIONS, ANSWERS)
    assert list(tallies) == ["CT", "MRI"]
    assert tallies["CT"] == Accuracy(total=2, right=2, strict=1, formatted=1)
    assert tallies["MRI"] == Accuracy(total=1, right=1, strict=0, formatted=0)


def test_accuracy_is_above_a_blind_guess_only_if_significantly_so():
    assert Accuracy(100, 60, 0, 0).above(0.49) and not Accuracy(100, 60, 0, 0).above(0.51)
    assert not Accuracy(1, 1, 0, 0).above(0.2) and not Accuracy(4, 4, 0, 0).above(
        0.5
    )  # few questions show nothing
    assert not Accuracy(300, 300, 0, 0).above(1.0)


def test_summary_and_table_show_before_and_after_and_star_what_is_not_above_the_blind_guess():
    before, after = (
        accuracy_by_modality(QUESTIONS, ["", "", ""]),
        accuracy_by_modality(QUESTIONS, ANSWERS),
    )
    summary = run_summary(before, after, BLIND, steps=3)
    assert summary["before"] == {"CT": 0.0, "MRI": 0.0} and summary["after"] == {
        "CT": 1.0,
        "MRI": 1.0,
    }
    assert summary["questions"] == {"CT": 2, "MRI": 1} and summary["chance"] == {
        "CT": 0.375,
        "MRI": 0.25,
    }
    assert summary["format_after"] == {"CT": 0.5, "MRI": 0.0} and summary["steps"] == 3
    assert summary["blind"] == BLIND
    lines = comparison_table(before, after, BLIND).splitlines()
    assert lines[1].split()[:5] == ["CT", "2", "37.5", "37.5", "0.0"] and "0 -> 50 %" in lines[1]
    assert "100.0 (34.2 to 100.0)*" in lines[1] and "100.0 (20.7 to 100.0)*" in lines[2]
    assert "no evidence of seeing" in lines[-1]
    sure = {"CT": Accuracy(100, 90, 0, 0)}
    assert "*" not in comparison_table(sure, sure, BLIND)


@pytest.mark.parametrize("kl", [{}, {"kl": 0.0}, {"kl": 3.7}])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_curves_are_well_formed_for_any_run(kl, count):
    row = {
        "reward": 1.7,
        "rewards/format": 1.0,
        "rewards/accuracy": 0.7,
        "completions/mean_length": 13.4,
    } | kl
    root = ElementTree.fromstring(curves_svg([{"step": step} | row for step in range(count)]))
    numbers = [
        float(x)
        for line in root.iter("{http://www.w3.org/2000/svg}polyline")
        for x in line.get("points").replace(",", " ").split()
    ]
    assert len(numbers) == 5 * 2 * count and all(0 <= x <= 400 for x in numbers)


def test_curves_of_a_run_without_steps_are_a_one_line_error(tmp_path, monkeypatch, capsys):
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
