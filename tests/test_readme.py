"""The README and the pages of docs/: the code that they quote, their length, and their links."""

import re
import textwrap
from pathlib import Path

import pytest

from common.errors import InputError
from miniature.lesson.quotes import with_quotes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "CHANGELOG.md")
] + sorted((ROOT / "docs").glob("*.md"))


def test_the_step_in_the_readme_is_a_piece_of_train_py():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    body = textwrap.dedent(re.search(r"^def grpo_step.*?\n(    .*?)\n\n\n", source, re.M | re.S)[1])
    assert len(block.splitlines()) > 10 and block in body


def test_the_code_that_the_lesson_quotes_is_the_source_and_its_links_lead_to_its_lines():
    page = (ROOT / "docs" / "grpo.md").read_text(encoding="utf-8")
    assert with_quotes(page) == page
    assert page.count("```python") >= 6 and page.count("#L") >= 10


def test_a_quote_that_the_source_does_not_have_is_an_error():
    with pytest.raises(InputError, match="0 lines begin with 'no such line'"):
        with_quotes("<!-- source: train.py | no such line | at all -->\n")
    with pytest.raises(InputError, match="train.py: no line after 'import sys'"):
        with_quotes("<!-- source: train.py | import sys | no such line -->\n")


def test_the_readme_is_short_enough_to_be_read_to_the_end():
    assert len(README.splitlines()) <= 110 and len(README.split()) <= 1400


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if not target.startswith("http"):
            assert not file or (page.parent / file).exists(), target
            linked = (page.parent / file) if file else page
            if anchor and linked.suffix == ".md":
                assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
