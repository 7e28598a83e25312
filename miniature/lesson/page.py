"""Where a lesson is shown: the terminal, docs/grpo.md and docs/lesson.svg."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

from markupsafe import Markup

from evaluation.report.curves import HEIGHT, panel_svg, picture_of
from evaluation.report.markdown import markdown_table, write_between_markers

from .measurements import Lesson, Panel

TOP_LABEL = 28  # pixels: the next line of text is below the title and the highest tick
COLOURS = ("blue", "orange", "violet", "grey")


def terminal_text(name: str, lesson: Lesson, see: str) -> str:
    """The table in aligned columns under its name, and what to see in it."""
    widths = [max(map(len, column)) for column in zip(lesson.head, *lesson.rows, strict=True)]
    lines = [name.upper()]
    for row in (lesson.head, *lesson.rows):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join((*lines, fill(" ".join(see.split()), 100), ""))


def write_page(lessons: Mapping[str, Lesson], folder: Path) -> None:
    """Fill the markers of `folder`/grpo.md and draw `folder`/lesson.svg."""
    panels: list[Markup] = []
    for name, lesson in lessons.items():
        table = markdown_table(lesson.head, lesson.rows)
        write_between_markers(folder / "grpo.md", name, table)
        panels += map(_draw, lesson.panels)
    (folder / "lesson.svg").write_text(picture_of(panels), encoding="utf-8")


def _draw(panel: Panel) -> Markup:
    series = []
    for (label, points), colour in zip(panel.lines.items(), COLOURS, strict=False):
        series.append((label, colour, points))
    labels = HEIGHT - 30 - 12 * len(series) if panel.labels_below else TOP_LABEL
    return panel_svg(panel.title, series, panel.unit, panel.top, labels)
