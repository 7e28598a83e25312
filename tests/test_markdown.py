"""An evaluation's tables in Markdown pages: their content, and where they are written."""

import json
import sys

import pytest
from test_report import accuracy, results

from evaluation.report import markdown
from evaluation.report.markdown import accuracy_table, check_table, type_table, write_tables

BLIND = {"chance": {"MRI": 0.3675, "CT": 0.5}, "text_prior": {"MRI": 0.528, "CT": 0.25}}
CHECKS = [
    {"model": "base", "check": "names an option", "rate": 0.25, "of": 8},
    {"model": "grpo", "check": "names an option", "rate": 1.0, "of": 7},
    {"model": "grpo", "check": "answer stays", "rate": 0.5, "of": 6},
]


def page(*names: str) -> str:
    parts = ["# Title"]
    for name in names:
        parts += [f"<!-- {name}: written by a command -->", "old", f"<!-- {name}: end -->"]
    return "\n".join([*parts, "last", ""])


def test_only_the_text_between_markers_is_replaced_and_again_changes_nothing(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(page("accuracy", "mine"))
    for _ in range(2):
        assert write_tables(file, {"accuracy": "new", "types": "elsewhere"}) == ["accuracy"]
        before, after = page("accuracy", "mine").split("old\n<!-- accuracy: end", 1)
        assert file.read_text() == f"{before}new\n<!-- accuracy: end{after}"


def test_the_table_has_the_guesses_and_each_model_with_a_star_if_not_above_the_best_guess():
    rows = [line.split(" | ") for line in accuracy_table(results(blind=BLIND)).splitlines()]
    assert rows[0][1:] == ["MRI, n = 100", "CT, n = 100 |"]
    assert rows[2] == ["| chance", "36.8", "50.0 |"]
    assert rows[3] == ["| best guess from the text alone", "52.8", "50.0 |"]
    assert [row[0] for row in rows[4:]] == [
        "| base model",
        "| SFT on the right letters",
        "| **GRPO**",
    ]
    assert rows[4][1] == "40.0 (30.9 to 49.8) \\*" and rows[6][1] == "90.0 (82.6 to 94.5)"


def test_a_missing_number_leaves_an_empty_cell_in_types_and_checks():
    kinds = [accuracy("base", "MRI", 9, 10, "Anatomy"), accuracy("base", "CT", 1, 10, "Side")]
    kinds.append(accuracy("grpo", "MRI", 10, 10, "Side"))
    lines = type_table(results(accuracy=kinds)).splitlines()[2:]
    assert lines == [
        "| MRI | base | 90.0 |  |",
        "| MRI | grpo |  | 100.0 |",
        "| CT | base |  | 10.0 \\* |",
    ]
    assert check_table(results(faithfulness=CHECKS)).splitlines()[2:] == [
        "| names an option | 25.0 of 8 |  | 100.0 of 7 |",
        "| answer stays |  |  | 50.0 of 6 |",
    ]


def test_the_command_prints_the_tables_it_wrote_and_refuses_a_page_without_markers(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "results.json").write_text(json.dumps(results(blind=BLIND)))
    file = tmp_path / "page.md"
    file.write_text(page("types"))
    monkeypatch.setattr(sys, "argv", ["markdown", str(tmp_path), str(file)])
    assert markdown.main() == 0 and capsys.readouterr().out == f"{file}: types\n"
    file.write_text("# nothing\n")
    assert markdown.main() == 2
    assert "has no markers for accuracy, types, checks" in capsys.readouterr().err
    assert file.read_text() == "# nothing\n"


@pytest.mark.parametrize("name", ["accuracy", "types", "checks"])
def test_every_line_of_a_table_has_the_same_number_of_cells(name):
    kinds = [accuracy("base", "MRI", 9, 10), accuracy("base", "MRI", 9, 10, "Anatomy")]
    made = results(accuracy=kinds, blind=BLIND, faithfulness=CHECKS, models=("base", "grpo"))
    lines = markdown.TABLES[name](made | {"accuracy": kinds}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
