"""The report: one HTML file that needs nothing else, to look at what the numbers are made of.

Model output, questions and file names are hostile text. The template escapes all that it prints; the cases travel as
JSON in a script element that is data and no program, and the page's own program shows them with `textContent` only. A
Content-Security-Policy forbids the page any request and any script but its own.
"""

import base64
import io
import secrets
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from data import load_image
from model import InputError

from .curves import STYLE, curve_panels, panel_svg

THUMBNAIL = 160  # pixels along the longer side
MODEL_COLOURS = 6  # that the page's style has, told apart by the colour-blind too

Row = dict[str, Any]


def write_report(file: Path, results: Row, cases: Sequence[Row], runs: dict[str, list[Row]]) -> None:
    """Write the page.

    Args:
        results: what results.json holds.
        cases: from `evaluation.results.cases`.
        runs: model -> rows of its run's metrics.jsonl, for the curves.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pct": lambda rate: f"{100 * rate:.1f}", "p": p_value, "words": lambda s: s.replace("_", " ")}
    models = [model["name"] for model in results["models"]]
    images = thumbnails(path for case in cases for path in case["images"])
    numbers = {path: number for number, path in enumerate(images)}
    page = environment.get_template("report.html.jinja").render(
        results=results,
        models=models,
        colour={name: f"m{number % MODEL_COLOURS}" for number, name in enumerate(models)},
        modalities=list(dict.fromkeys(row["modality"] for row in results["accuracy"])),
        groups=_groups(results, by_type=False),
        types=_groups(results, by_type=True),
        verdict=verdict(results),
        blind=_blind(results),
        pairs=_pairs(results.get("pairs") or []),
        checks=_checks(results.get("faithfulness") or []),
        early=_early(results.get("early_answering") or {}, models),
        leakage=results.get("leakage"),
        samples=results.get("samples"),
        curve_style=Markup(STYLE),
        curves={name: [Markup(panel) for panel in curve_panels(rows)] for name, rows in runs.items() if rows},
        data={
            "models": models,
            "images": list(images.values()),
            "cases": [case | {"images": [numbers[path] for path in case["images"]]} for case in cases],
        },
        nonce=secrets.token_urlsafe(16),
    )
    file.write_bytes(page.encode("utf-8", "replace"))  # a question file may hold what UTF-8 can't


def thumbnails(paths: Iterable[str]) -> dict[str, str | None]:
    """Path -> a small WebP as a data URI, each image once; None for one that can't be read any more."""
    small: dict[str, str | None] = {}
    for path in tqdm(list(dict.fromkeys(paths)), desc="thumbnails", unit="image", dynamic_ncols=True, leave=False):
        try:
            image = load_image(path)
        except InputError:
            small[path] = None
            continue
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(stream := io.BytesIO(), "WEBP", quality=80)
        small[path] = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
    return small


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def verdict(results: Row) -> list[str]:
    """What the table says, a sentence for each model and one for each two."""
    whole = [row for row in results["accuracy"] if row["question_type"] is None]
    sentences = []
    for model, group in groupby(whole, key=lambda row: row["model"]):
        rows = list(group)
        rates = _listed([f"{100 * row['rate']:.1f} % of {row['modality']}" for row in rows])
        unseen = [row["modality"] for row in rows if not row["sees"]]
        if not unseen:
            judged = "more than the best guess without the image gives" + " in each of them" * (len(rows) > 1)
        elif len(unseen) == len(rows):
            judged = "not more than the best guess without the image gives: no evidence of seeing"
        else:
            judged = f"in {_listed(unseen)} not more than the best guess without the image: no evidence of seeing there"
        sentences.append(f"{model} answers {rates} right, {judged}.")
    for (first, second), group in groupby(results.get("pairs") or [], key=lambda row: (row["first"], row["second"])):
        sure = {sign: [row["modality"] for row in rows if row["p"] < 0.01 and _sign(row) == sign]
                for rows in [list(group)] for sign in (1, -1)}  # fmt: skip
        parts = [f"{word} in {_listed(names)}" for word, names in zip(("better", "worse"), sure.values()) if names]
        sentences.append(
            f"{first} is {_listed(parts)} than {second} (McNemar, p < 0.01)."
            if parts
            else f"Between {first} and {second} all differences may be chance (McNemar, p ≥ 0.01)."
        )
    return sentences


def _sign(pair: Row) -> int:
    return 1 if pair["only_first"] > pair["only_second"] else -1


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _groups(results: Row, by_type: bool) -> list[Row]:
    """The table's rows by modality, or by modality and question type."""
    rows = [row for row in results["accuracy"] if (row["question_type"] is not None) == by_type]
    keys = dict.fromkeys((row["modality"], row["question_type"]) for row in rows)
    trained = results.get("train_modality")
    return [
        {
            "modality": modality,
            "type": question_type,
            "role": ("in domain" if modality == trained else "out of domain") if trained else "",
            "rows": [row for row in rows if (row["modality"], row["question_type"]) == (modality, question_type)],
        }
        for modality, question_type in keys
    ]


def _blind(results: Row) -> list[tuple[str, dict[str, float]]]:
    """What can be had without the image, by name: the text's baselines, then each model with its image taken away."""
    table = list(results["blind"].items())
    for model, probes in (results.get("ablated") or {}).items():
        table += [(f"{model}, {probe}", rates) for probe, rates in probes.items()]
    return table


def _pairs(pairs: Sequence[Row]) -> list[tuple[str, str, dict[str, Row]]]:
    keys = dict.fromkeys((row["first"], row["second"]) for row in pairs)
    return [(*key, {row["modality"]: row for row in pairs if (row["first"], row["second"]) == key}) for key in keys]


def _checks(rows: Sequence[Row]) -> list[tuple[str, dict[str, Row]]]:
    """(check, model -> row), in the order of the checks."""
    checks = dict.fromkeys(row["check"] for row in rows)
    return [(check, {row["model"]: row for row in rows if row["check"] == check}) for check in checks]


def _early(early: dict[str, list[Row]], models: Sequence[str]) -> list[Markup]:
    """Over the share of the reasoning that is kept: the answers that still change after it, and the right ones."""
    reasoned = {model: rows for model, rows in early.items() if rows}
    colour = {name: f"m{number % MODEL_COLOURS}" for number, name in enumerate(models)}
    return [
        Markup(
            panel_svg(
                title,
                [(model, colour[model], [(100 * row["kept"], row[what]) for row in rows]) for model, rows in reasoned.items()],
                unit="% of the reasoning kept",
                top=1.0,
            )
        )
        for title, what in (("Answers that differ from the final one", "changed"), ("Right answers", "right"))
        if reasoned
    ]
