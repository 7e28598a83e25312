"""docs/faults.md, made of the rows of tests/faults.py and the messages that the tests saw.

    FAULTS_TABLE=write python -m pytest tests

writes each message into its row as its test runs. Otherwise each test compares its message with the
page.
"""

import fcntl
import os
import re
import textwrap
from pathlib import Path

from faults import GOES_ON, GROUPS, Elsewhere, Fault

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "faults.md"
ROWS = {row.what: row for group in GROUPS for row in group.rows}
WRITING = os.environ.get("FAULTS_TABLE") == "write"
LONG_WORD = 17
"""Characters from which on a word may be broken, so that a table fits the screen of a phone."""

HEAD = """# What can go wrong

When something outside the program goes wrong (a file, a disk, a GPU's memory, a signal), train.py
prints one line on stderr that names the cause and the remedy, without a traceback. Finished
checkpoints are kept. Once the cause is fixed, the same command resumes the run.

| exit code | meaning | what to do |
|---|---|---|
| 0 | done | look at `summary.json`; evaluate `model/` |
| 2 | something must be fixed | do what the line says, then run the same command again |
| 130, 143, 129 | stopped by Ctrl-C, SIGTERM or SIGHUP | run the same command again |
| 137 | killed, perhaps by the out-of-memory killer | check memory with `--dry-run`, then run the \
same command again |

Every row below has a test; unless a file is named, it is in
[test_faults.py](../tests/test_faults.py), which resumes a tiny run that has finished 2 of its 6
steps, with a checkpoint after each. The tests write the messages into this page as printed, with
paths shortened; only words in italics are summaries. A bold number is an exit code other than 2;
with 0, the run completed.
"""


def show(what: str, text: str, folder: Path) -> None:
    """Hand over the message of a row: the last line of `text` that has the row's words.

    The page must have it, but for numbers and for parentheses, which quote libraries. With
    FAULTS_TABLE=write it is put there instead. Paths lose `folder`.
    """
    lines = [line for line in re.split("[\r\n]+", text) if ROWS[what].says in line]
    assert lines, f"no line with {ROWS[what].says!r} in {text!r}"
    message = lines[-1].strip().removeprefix("train.py: ").replace(f"{folder}/", "")
    message = re.sub(r"http://127\.0\.0\.1:\d+", "https://huggingface.co", message)
    if WRITING:
        with PAGE.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other workers of pytest write it too
            text = page(messages_on(file.read()) | {what: escaped(message)})
            file.seek(0)
            file.truncate()
            file.write(text)
    on_page = messages_on(PAGE.read_text(encoding="utf-8")).get(what, "")
    remedy = f"FAULTS_TABLE=write python -m pytest tests/{file_of(ROWS[what])}"
    assert own_words(on_page) == own_words(escaped(message)), f"{PAGE} is out of date: {remedy}"


def own_words(message: str) -> str:
    """A message without the parentheses, which quote libraries, and with 0 for every number."""
    while message != (shorter := re.sub(r"\([^()]*\)", "", message)):
        message = shorter
    return re.sub(r"\d+", "0", message)


def page(messages: dict[str, str]) -> str:
    """The whole page; `messages` by row, as `messages_on` returns them."""
    lines = [HEAD]
    for group in GROUPS:
        lines += [f"## {group.heading}", "", textwrap.fill(group.introduction, 100), ""]
        lines += ["| what happens | what train.py prints |", "|---|---|"]
        for row in group.rows:
            before, after = around_the_message(row)
            message = messages.get(row.what, "") if row.says else ""
            lines.append(f"| {first_cell(row)} | {before}{message}{after} |")
        lines.append("")
    return "\n".join(lines)


def first_cell(row: Fault | Elsewhere) -> str:
    cell = escaped(row.what)
    if row.test:
        file, name = row.test.split("::")
        cell += f' ([{breakable(file.removesuffix(".py"))}](../tests/{file} "{name}"))'
    return cell


def around_the_message(row: Fault | Elsewhere) -> tuple[str, str]:
    """What stands before and after the message in its cell: exit code, summary, what is left."""
    before = f"**{row.code}** " if row.code != 2 else ""
    if row.summary or not row.says:
        before += f"*{row.summary or GOES_ON}*"
    return before, f"<br>Left: {escaped(row.left)}." if row.left else ""


def messages_on(text: str) -> dict[str, str]:
    """The messages that stand on a page, by row."""
    cells = {}
    for line in text.split("\n"):
        what, _, cell = line.removeprefix("| ").removesuffix(" |").partition(" | ")
        cells[what] = cell
    messages = {}
    for row in ROWS.values():
        before, after = around_the_message(row)
        message = cells.get(first_cell(row), "").removeprefix(before).removesuffix(after)
        messages[row.what] = message
    return messages


def file_of(row: Fault | Elsewhere) -> str:
    return row.test.split("::")[0] or "test_faults.py"


def escaped(text: str) -> str:
    """Text as a cell of a Markdown table shows it; words between backticks stay code."""
    parts = text.replace("|", r"\|").split("`")
    for i in range(0, len(parts), 2):
        plain = re.sub(r"[\\*~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", parts[i])
        parts[i] = breakable(plain.replace("<", "&lt;"))
    return "`".join(parts)


def breakable(text: str) -> str:
    """Text whose long words (paths, file names) a browser may break where a <wbr> stands."""

    def broken(word: re.Match[str]) -> str:
        return re.sub(r"(\w[/._])(?=\w)|([a-z])(?=[A-Z])", r"\g<0><wbr>", word[0])

    return re.sub(rf"[^\s()]{{{LONG_WORD},}}", broken, text)
