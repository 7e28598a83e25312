"""Quotes from the source in Markdown pages: code blocks, and links to lines.

A marker such as

    <!-- source: grpo/loss.py | surrogate = torch.minimum | below, above = below -->

is followed by the lines of that file from the first that begins with the one text to the next that
begins with the other. A link whose text is code, [`r = probability_ratio(`](../grpo/loss.py#L1),
gets the number of the line that contains this text. Both must be found, and the first only once.
"""

import re
import textwrap
from pathlib import Path

from common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = re.compile(r"(<!-- source: (.+?) \| (.+?) \| (.+?) -->\n)(?:```python\n.*?```\n)?", re.S)
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L\d+\)")


def with_quotes(text: str) -> str:
    """The page with every quote as the source has it now."""
    text = BLOCK.sub(_block, text)
    return LINK.sub(_link, text)


def _block(match: re.Match[str]) -> str:
    marker, file, begin, end = match.groups()
    lines, first = _find(file, begin)
    for last in range(first, len(lines)):
        if lines[last].lstrip().startswith(end):
            code = textwrap.dedent("\n".join(lines[first : last + 1]))
            return f"{marker}```python\n{code}\n```\n"
    raise InputError(f"{file}: no line after {begin!r} begins with {end!r}")


def _link(match: re.Match[str]) -> str:
    code, file = match.groups()
    _, index = _find(file, code)
    return f"[`{code}`](../{file}#L{index + 1})"


def _find(file: str, begin: str) -> tuple[list[str], int]:
    """The file's lines, and the index of the one that is this text or else begins with it."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    equal = [n for n, line in enumerate(lines) if line.strip() == begin]
    found = equal or [n for n, line in enumerate(lines) if line.lstrip().startswith(begin)]
    if len(found) != 1:
        raise InputError(f"{file}: {len(found)} lines begin with {begin!r}, not one")
    return lines, found[0]
