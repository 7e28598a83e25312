"""Every fault of tests/faults.py, brought about: one line, the right exit code, and nothing lost;
and docs/faults.md, which lists them.
"""

import ast
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
from faults import FAULTS, FINISHED, LAST_STEP, MOVED, STEP_2, UNCHANGED, Elsewhere, Fault
from faults_page import PAGE, ROOT, ROWS, WRITING, messages_on, page
from tiny_run import write_run

import train
from training.checkpoint import damage_of


@pytest.fixture(scope="module")
def half_done(tmp_path_factory) -> Path:
    """A folder with a run that has finished 2 of its 6 steps, and a checkpoint of each."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the config's paths are relative, so that the folder can be copied
        write_run(Path(), test_questions=[], save_every=1, steps=6)
        patch.setattr(sys, "argv", ["train.py", "--config", "config.toml"])
        sample_groups, calls = train.sample_groups, []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return sample_groups(*args, **kwargs)

        patch.setattr(train, "sample_groups", stopping)
        assert train.main() == 130
    return folder


def bring_about(
    fault: Fault, half_done: Path, folder: Path, monkeypatch, capsys
) -> tuple[int, str, dict[str, bytes]]:
    """Copy the run to `folder`, spoil it and start train.py there.

    Returns its exit code, what it printed, and the contents of the run folder before.
    """
    shutil.copytree(half_done, folder)
    monkeypatch.chdir(folder)
    fault.before(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.toml", *fault.flags])
    if fault.during:
        sample_groups, struck = train.sample_groups, []

        def striking(*args, **kwargs):
            if not struck:
                struck.append(1)
                fault.during(folder)
            return sample_groups(*args, **kwargs)

        monkeypatch.setattr(train, "sample_groups", striking)
    monkeypatch.setattr(time, "time", time.time)  # a fault may set it: it is restored
    before = contents(folder / "run")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        code = train.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, f"{captured.out}\n{captured.err}", before


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
    kept = folder / ("elsewhere" if fault.leaves == MOVED else "run/checkpoints")
    newest = max(path for path in kept.glob("step-*") if not path.suffix)
    assert damage_of(newest) == "" and not list(kept.glob("*.partial"))
    steps = {FINISHED: (6,), LAST_STEP: (3, 4, 5, 6), STEP_2: (2,), MOVED: (2,)}[fault.leaves]
    assert int(newest.name.removeprefix("step-")) in steps
    assert fault.leaves != FINISHED or (folder / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_is_one_line_with_its_exit_code_and_loses_nothing(
    fault, half_done, tmp_path, monkeypatch, capsys, in_docs
):
    folder = tmp_path / "spoilt"
    with monkeypatch.context() as patch:
        code, printed, before = bring_about(fault, half_done, folder, patch, capsys)
    assert code == fault.code, printed
    lines = [line for line in re.split("[\r\n]+", printed) if line.startswith("train.py: ")]
    assert len(lines) == (fault.code != 0), lines
    assert all(fault.says in line and len(line) < 1000 for line in lines), lines
    check_what_is_left(fault, folder, before)
    assert not (folder / "owned").exists()
    if fault.says:
        in_docs(fault.what, printed, folder)


def test_the_page_has_every_row_with_its_message_and_every_row_a_test():
    text = PAGE.read_text(encoding="utf-8")
    messages = messages_on(text)
    assert text == page(messages)
    assert len(ROWS) >= 90 and len({fault.what for fault in FAULTS}) == len(FAULTS)
    for row in ROWS.values():
        # While the page is written, another test may still have to hand its message over.
        assert messages[row.what] or not row.says or WRITING, row.what
        if isinstance(row, Elsewhere):
            file, name = row.test.split("::")
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            functions = {
                node.name
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef)
            }
            assert name in functions, row.test
            assert row.summary or row.what in source, f"{row.what}: nobody hands its message over"
