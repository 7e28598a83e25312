"""A run's curves as one SVG picture: `python -m evaluation.report.curves runs/miniature
curves.svg`.

The picture has no background of its own and follows the reader's light or dark scheme. All its
style is bound to the class "curves", so that it may stand in a page.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from common.errors import InputError

Points = Sequence[tuple[float, float]]
Series = tuple[str, str, Points]
"""Label ("" for none), class that gives it its colour, points (x, y)."""

GRPO_PANELS = (
    ("Reward", (("reward", "", "blue"),)),
    (
        "Share of completions",
        (("rewards/format", "format", "orange"), ("rewards/accuracy", "accuracy", "blue")),
    ),
    ("KL to the base (nats per token)", (("kl", "", "violet"),)),
    ("Completion length (tokens)", (("completion_tokens", "", "grey"),)),
)
SFT_PANELS = (
    ("Loss (nats per token)", (("loss", "", "violet"),)),
    ("Probability of the whole answer", (("probability", "", "blue"),)),
)
WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 170, 44, 34, 26

LIGHT = {"blue": "#0369a1", "orange": "#b84a00", "violet": "#7c3aed", "grey": "#475569"}
DARK = {"blue": "#56b4e9", "orange": "#f59a52", "violet": "#b79bff", "grey": "#cbd5e1"}


def _scheme(text: str, grid: str, colours: dict[str, str]) -> str:
    lines = "".join(
        f".curves polyline.{name}{{stroke:{colour}}}.curves text.{name}{{fill:{colour}}}"
        for name, colour in colours.items()
    )
    return f".curves text{{fill:{text}}}.curves path{{stroke:{grid}}}{lines}"


STYLE = (
    ".curves text{font:11px system-ui,sans-serif}.curves .title{font-weight:600;font-size:12px}"
    ".curves polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}"
    f"{_scheme('#334155', '#e2e8f0', LIGHT)}@media screen and (prefers-color-scheme:dark){{"
    f"{_scheme('#cbd5e1', '#333a45', DARK)}}}"
)


def curves_svg(rows: Sequence[dict[str, float]]) -> str:
    """Small multiples of the metrics over the steps; `rows` are the objects of metrics.jsonl, at
    least one.
    """
    panels = curve_panels(rows)
    columns, lines = 2, -(-len(panels) // 2)
    width, height = columns * (WIDTH + GAP) + GAP, lines * (HEIGHT + GAP) + GAP
    placed = []
    for i, panel in enumerate(panels):
        left, top = GAP + i % columns * (WIDTH + GAP), GAP / 2 + i // columns * (HEIGHT + GAP)
        placed.append(f'<g transform="translate({left},{top})">{panel}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{STYLE}</style>{''.join(placed)}</svg>\n"
    )


def curve_panels(rows: Sequence[dict[str, float]]) -> list[str]:
    """The panels one by one: those of a GRPO run, or of an SFT run if no row has a reward. They
    need `STYLE`.
    """
    panels = GRPO_PANELS if any("reward" in row for row in rows) else SFT_PANELS
    return [
        panel_svg(title, [(label, colour, _points(rows, name)) for name, label, colour in series])
        for title, series in panels
    ]


def panel_svg(title: str, series: Sequence[Series], unit: str = "step", top: float = 0.0) -> str:
    """One panel as an <svg> element: lines over x, y from 0 to `top`, or to a round number above
    all if that is 0.

    Args:
        unit: what x counts.
    """
    xs = [x for _, _, points in series for x, _ in points]
    first, last = min(xs, default=0.0), max(xs, default=1.0)
    top = top or _round_up(max((y for _, _, points in series for _, y in points), default=0.0))
    right, bottom = WIDTH - 8, HEIGHT - 22

    def x(value: float) -> float:
        return LEFT + (right - LEFT) * (value - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * value / top

    parts = [f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>']
    for value in (0, top / 2, top):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for value, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text x="{x(value):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{value:.0f}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(unit)}</text>'
    )
    for at, (label, colour, points) in enumerate(series):
        drawn = " ".join(f"{x(at_x):.1f},{y(at_y):.1f}" for at_x, at_y in points)
        parts.append(f'<polyline class="{colour}" points="{drawn}"/>')
        parts.append(
            f'<text class="{colour}" x="{right}" y="{14 + 12 * at}" text-anchor="end">{escape(label)}</text>'
            if label
            else ""
        )
    return (
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _points(rows: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value), 0 where a run doesn't log it; without those that are no number, which no axis
    can show.
    """
    values = ((row["step"], row.get(name, 0.0)) for row in rows)
    return [(step, max(0.0, value)) for step, value in values if math.isfinite(value)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 10 times a power of ten: an axis that ends at a number people
    know.
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** (len(f"{int(1 / value)}") * -1 if value < 1 else len(f"{int(value)}") - 1)
    return next(power * factor for factor in (1, 2, 4, 5, 10) if power * factor >= value * 0.999)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, without a last one that is cut. InputError if it holds
    anything else.
    """
    rows = []
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        try:
            numbers = json.loads(line).items()  # null is written for what was not finite
            rows.append(
                {name: math.nan if value is None else float(value) for name, value in numbers}
            )
            rows[-1]["step"]
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise InputError(
                f"{file} line {number}: not the numbers of a step ({type(error).__name__}); mend the line"
            ) from None
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, with metrics.jsonl")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    try:
        rows = read_metrics(arguments.run / "metrics.jsonl")
        if not rows:
            raise InputError(f"{arguments.run / 'metrics.jsonl'}: no steps yet; train first")
        arguments.picture.write_text(curves_svg(rows), encoding="utf-8")
    except InputError as error:
        print(f"curves: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"curves: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
