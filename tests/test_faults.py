"""Every fault of tests/faults.py, brought about: one line, the right exit code, and nothing lost;
and docs/faults.md.

FAULTS_TABLE=write python -m pytest tests/test_faults.py     writes the table anew from what was
seen
"""

import ast
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
from faults import (
    ELSEWHERE,
    FAULTS,
    FINISHED,
    HEAD,
    LEFT,
    SAVED,
    STEP_2,
    TESTED_ELSEWHERE,
    UNCHANGED,
    Fault,
)
from tiny_run import write_run

import train
from training.checkpoint import damage_of

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "faults.md"
SAID: dict[str, str] = {}
"""What train.py said to each fault in this session, paths relative to the run's surroundings."""


@pytest.fixture(scope="module")
def half_done(tmp_path_factory) -> Path:
    """A run with 2 of its 6 steps done, and a checkpoint of each."""
    folder = tmp_path_factory.mktemp("half") / "run-of-two"
    folder.mkdir()
    config = write_run(folder, test_questions=[], save_every=1, steps=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--config", str(config)])
        steps, calls = train.sample_groups, []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return steps(*args, **kwargs)

        patch.setattr(train, "sample_groups", stopping)
        assert train.main() == 130
    return folder


def bring_about(
    fault: Fault, half_done: Path, folder: Path, monkeypatch, capsys
) -> tuple[int, list[str], dict[str, bytes]]:
    """Copy the run, spoil it, start train.py: its exit code, the lines that are its own, and what
    it found in the run.
    """
    shutil.copytree(half_done, folder)
    for file in (folder / "config.toml", folder / "run" / "config.toml"):
        file.write_text(file.read_text().replace(str(half_done), str(folder)))
    fault.before(folder)
    flags = [flag.replace("{folder}", str(folder)) for flag in fault.flags]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(folder / "config.toml"), *flags])
    if fault.during:
        steps, struck = train.sample_groups, []

        def striking(*args, **kwargs):
            if not struck:
                struck.append(1)
                fault.during(folder)
            return steps(*args, **kwargs)

        monkeypatch.setattr(train, "sample_groups", striking)
    monkeypatch.setattr(time, "time", time.time)  # what a fault sets is undone
    found = contents(folder / "run")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        code = train.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return (
        code,
        [line for line in re.split("[\r\n]+", shown) if line.startswith("train.py: ")],
        found,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def check_what_is_left(fault: Fault, folder: Path, before: dict[str, bytes]) -> None:
    if fault.leaves == UNCHANGED:
        assert contents(folder / "run") == before
        return
    kept = folder / ("elsewhere" if fault.leaves == ELSEWHERE else "run/checkpoints")
    newest = max(path for path in kept.glob("step-*") if not path.suffix)
    assert damage_of(newest) == "" and not list(kept.glob("*.partial"))
    steps = {FINISHED: (6,), SAVED: (3, 4, 5, 6), STEP_2: (2,), ELSEWHERE: (2,)}[fault.leaves]
    assert int(newest.name.removeprefix("step-")) in steps
    assert fault.leaves != FINISHED or (folder / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_is_one_line_with_its_exit_code_and_loses_nothing(
    fault, half_done, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        code, lines, before = bring_about(fault, half_done, tmp_path / "spoilt", patch, capsys)
    assert code == fault.code, lines
    assert len(lines) == (fault.code != 0) and all(
        fault.says in line and len(line) < 1000 for line in lines
    ), lines
    SAID[fault.what] = (
        "".join(lines).removeprefix("train.py: ").replace(f"{tmp_path / 'spoilt'}/", "")
    )
    check_what_is_left(fault, tmp_path / "spoilt", before)
    assert not (tmp_path / "spoilt" / "owned").exists()


def cells(*texts: object) -> str:
    return (
        "| "
        + " | ".join(
            str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for text in texts
        )
        + " |"
    )


def table() -> str:
    lines = [
        HEAD,
        cells("what happens", "exit", "what is said", "what is left", "test"),
        "|---|---|---|---|---|",
    ]
    lines += [
        cells(f.what, f.code, SAID[f.what] or "(it goes on)", f.leaves, "test_faults.py")
        for f in FAULTS
    ]
    lines += [cells(*row) for row in TESTED_ELSEWHERE]
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_of_these_faults():
    if os.environ.get("FAULTS_TABLE") == "write":
        TABLE.write_text(table(), encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ")
        for line in TABLE.read_text(encoding="utf-8").split("\n")
        if line.startswith("| ")
    ]
    found = {row[0]: row[1:] for row in rows[1:]}
    assert len(found) >= 40 and len({fault.what for fault in FAULTS}) == len(FAULTS)
    assert {fault.leaves for fault in FAULTS} == set(LEFT)
    for fault in FAULTS:
        code, message, left, _ = found.pop(cells(fault.what).strip("| "))
        assert (code, left) == (str(fault.code), fault.leaves) and cells(fault.says).strip(
            "| "
        ) in message, fault.what
    assert [[what, *row] for what, row in found.items()] == [
        [cells(cell).strip("| ") for cell in row] for row in TESTED_ELSEWHERE
    ]
    for *_, test in TESTED_ELSEWHERE:
        file, name = test.split("::")
        names = {
            node.name
            for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in names, test
