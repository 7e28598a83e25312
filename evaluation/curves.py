"""A run's curves as one SVG picture: `python -m evaluation.curves runs/miniature curves.svg`."""

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from model import InputError

PANELS = (
    ("Reward", (("reward", "reward", "#2563eb"),)),
    ("Share of completions", (("rewards/format", "format", "#d97706"), ("rewards/accuracy", "accuracy", "#059669"))),
    ("KL to the base (nats per token)", (("kl", "KL", "#7c3aed"),)),
    ("Completion length (tokens)", (("completion_tokens", "length", "#475569"),)),
)
WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 170, 44, 34, 26


def curves_svg(rows: Sequence[dict[str, float]]) -> str:
    """Small multiples of the metrics over the steps; `rows` are the objects of metrics.jsonl, at least one."""
    columns, lines = 2, -(-len(PANELS) // 2)
    width, height = columns * (WIDTH + GAP) + GAP, lines * (HEIGHT + GAP) + GAP
    panels = []
    for i, panel in enumerate(PANELS):
        left, top = GAP + i % columns * (WIDTH + GAP), GAP / 2 + i // columns * (HEIGHT + GAP)
        panels.append(f'<g transform="translate({left},{top})">{_panel(rows, *panel)}</g>')
    style = "text{font:11px system-ui,sans-serif;fill:#334155}.title{font-weight:600;font-size:12px}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#ffffff"/>{"".join(panels)}</svg>\n'
    )


def _panel(rows: Sequence[dict[str, float]], title: str, series: Sequence[tuple[str, str, str]]) -> str:
    steps = [row["step"] for row in rows]
    top = _round_up(max(row.get(name, 0.0) for name, _, _ in series for row in rows))
    right, bottom = WIDTH - 8, HEIGHT - 22

    def x(step: float) -> float:
        return LEFT + (right - LEFT) * (step - steps[0]) / max(1, steps[-1] - steps[0])

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * value / top

    parts = [f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>']
    for value in (0, top / 2, top):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{right}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step in (steps[0], steps[-1]):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:.0f}</text>')
    for at, (name, label, colour) in enumerate(series):
        points = " ".join(f"{x(row['step']):.1f},{y(max(0.0, row.get(name, 0.0))):.1f}" for row in rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(
            f'<text x="{right}" y="{14 + 12 * at}" text-anchor="end" style="fill:{colour}">{escape(label)}</text>'
        )
    return "".join(parts)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 10 times a power of ten: an axis that ends at a number people know."""
    if value <= 0:
        return 1.0
    power = 10.0 ** (len(f"{int(1 / value)}") * -1 if value < 1 else len(f"{int(value)}") - 1)
    return next(power * factor for factor in (1, 2, 4, 5, 10) if power * factor >= value * 0.999)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, with metrics.jsonl")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    try:
        with (arguments.run / "metrics.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if not rows:
            raise InputError(f"{arguments.run / 'metrics.jsonl'}: no steps yet; train first")
        arguments.picture.write_text(curves_svg(rows), encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"curves: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
