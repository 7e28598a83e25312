"""Draw a run's training curves as an SVG picture.

    python -m evaluation.report.curves runs/miniature curves.svg

The picture has no background and follows the reader's light or dark scheme. Its style applies only
to the class "curves", so that it can be embedded in a page.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from common.errors import InputError
from common.files import read_json_lines
from common.program import run_program

from .templating import ENVIRONMENT, TEMPLATES

# Markup, because this text is ours and must not be escaped.
STYLE = Markup((TEMPLATES / "curves.css").read_text(encoding="utf-8"))

Points = Sequence[tuple[float, float]]
Metrics = dict[str, float]

GRPO_PANELS = {
    "Reward": {"reward": ("", "blue")},
    "Share of completions": {
        "rewards/format": ("format", "orange"),
        "rewards/accuracy": ("accuracy", "blue"),
    },
    "KL to the base (nats per token)": {"kl": ("", "violet")},
    "Completion length (tokens)": {"completions/mean_length": ("", "grey")},
}
"""Panel title -> metric -> its label ("" for none) and its colour, a class of curves.css."""
SFT_PANELS = {
    "Loss (nats per token)": {"loss": ("", "violet")},
    "Probability of the whole answer": {"probability": ("", "blue")},
}
WIDTH = 330  # pixels of a panel
HEIGHT = 170
GAP = 26  # pixels between panels, and around them


class Axis(NamedTuple):
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        extent = self.high - self.low or 1  # a run of one step has no extent
        return self.start + (self.end - self.start) * (value - self.low) / extent


def curves_svg(rows: Sequence[Metrics]) -> str:
    """The metrics over the steps, as small multiples. `rows` (at least one) are those of
    metrics.jsonl.
    """
    return picture_of(curve_panels(rows))


def picture_of(panels: Sequence[Markup]) -> str:
    """The panels as one picture, two in each row."""
    return ENVIRONMENT.get_template("curves.svg.jinja").render(
        panels=panels, style=STYLE, panel_width=WIDTH, panel_height=HEIGHT, gap=GAP
    )


def curve_panels(rows: Sequence[Metrics]) -> list[Markup]:
    """The panels of a GRPO run, or of an SFT run if no row has a reward. They need `STYLE`."""
    is_grpo = any("reward" in row for row in rows)
    panels = []
    for title, metrics in (GRPO_PANELS if is_grpo else SFT_PANELS).items():
        series = [(*style, _points(rows, name)) for name, style in metrics.items()]
        panels.append(panel_svg(title, series))
    return panels


def panel_svg(
    title: str,
    series: Sequence[tuple[str, str, Points]],
    unit: str = "step",
    top: float = 0.0,
    labels: float = 14,
) -> Markup:
    """One panel as an <svg> element: lines over x, with y from 0 to `top`. If `top` is 0, y ends at
    a round number above all points.

    Args:
        series: label ("" for none), colour (a class), points (x, y).
        unit: the unit of x.
        labels: the y pixel of the first label; the others follow below.
    """
    every_point = list(chain.from_iterable(points for _, _, points in series))
    steps, heights = zip(*every_point or [(0.0, 0.0)], strict=True)
    panel = ENVIRONMENT.get_template("panel.svg.jinja").render(
        title=title,
        series=series,
        unit=unit,
        labels=labels,
        width=WIDTH,
        height=HEIGHT,
        # Room for the labels of y at the left, the title above, and the labels of x below.
        x=Axis(min(steps), max(steps), 44, WIDTH - 8),
        y=Axis(0.0, top or _round_up(max(heights)), HEIGHT - 22, 34),
    )
    return Markup(panel)


def _points(rows: Sequence[Metrics], name: str) -> list[tuple[float, float]]:
    """(step, value) of each row; 0 if the metric is not logged, left out if it is not finite."""
    points = []
    for row in rows:
        value = row.get(name, 0.0)
        if math.isfinite(value):
            points.append((row["step"], max(0.0, value)))  # the axis starts at 0
    return points


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 10 times a power of ten, so that the axis ends at a round number."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (1, 2, 4, 5):
        if power * factor >= value * 0.999:  # a curve may exceed its panel by less than a pixel
            return power * factor
    return power * 10


def read_metrics(file: Path) -> list[Metrics]:
    """Read the rows of a run's metrics.jsonl. InputError if it holds anything but numbers."""
    rows = []
    remedy = "correct the line, or give a run folder"
    for number, row in read_json_lines(file, remedy):
        try:
            # null stands for a value that was not finite.
            metrics = {name: float("nan" if x is None else x) for name, x in row.items()}
            metrics["step"] = float(row["step"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise InputError(f"{file} line {number}: not the numbers of a step; {remedy}") from None
        rows.append(metrics)
    return rows


def main() -> int:
    return run_program("curves", _draw)


def _draw() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder, with metrics.jsonl")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    file = arguments.run / "metrics.jsonl"
    rows = read_metrics(file)
    if not rows:
        raise InputError(f"{file}: no steps yet; train first")
    arguments.picture.write_text(curves_svg(rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
