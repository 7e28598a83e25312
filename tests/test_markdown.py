"""An evaluation's table in a Markdown page: what it says, and where it is written."""

import json
import sys

import pytest
from test_report import results

from evaluation.report import markdown
from evaluation.report.markdown import accuracy_table

BEGIN, END = "<!-- accuracy: written by a command -->\n", "<!-- accuracy: end -->\n"
BLIND = {"chance": {"MRI": 0.3675, "CT": 0.5}, "text_prior": {"MRI": 0.528, "CT": 0.25}}


def test_the_table_has_the_guesses_and_each_model_with_a_star_where_nothing_was_seen():
    rows = [line.split(" | ") for line in accuracy_table(results(blind=BLIND)).splitlines()]
    assert {len(row) for row in rows} == {3}
    assert rows[0][1:] == ["MRI, n = 100", "CT, n = 100 |"]
    assert rows[2] == ["| chance", "36.8", "50.0 |"]
    assert rows[3] == ["| best guess from the text alone", "52.8", "50.0 |"]
    names = ["| base model", "| SFT on the right letters", "| **GRPO**"]
    assert [row[0] for row in rows[4:]] == names
    assert rows[4][1] == "40.0 (30.9 to 49.8) \\*" and rows[6][1] == "90.0 (82.6 to 94.5)"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The program's arguments: an evaluation, and a page that does not exist yet."""
    (tmp_path / "results.json").write_text(json.dumps(results(blind=BLIND)))
    monkeypatch.setattr(sys, "argv", ["markdown", str(tmp_path), str(tmp_path / "page.md")])
    return tmp_path / "page.md"


def test_only_the_text_between_the_markers_is_replaced_and_twice_is_once(command):
    command.write_text(f"before\n{BEGIN}old\n{END}after\n")
    for _ in range(2):
        assert markdown.main() == 0
        table = accuracy_table(results(blind=BLIND))
        assert command.read_text() == f"before\n{BEGIN}{table}{END}after\n"


def test_a_page_without_markers_is_refused_and_stays_as_it_is(command, capsys):
    command.write_text(f"before\n{BEGIN}old\n")
    assert markdown.main() == 2
    assert "has no markers" in capsys.readouterr().err
    assert command.read_text() == f"before\n{BEGIN}old\n"
