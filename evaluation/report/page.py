"""What an evaluation measured, as one HTML file that needs nothing but itself: the table, the
audits, and every case.

Nothing is loaded over a network, and the page's own policy forbids it. Completions, questions and
names of files are hostile text: the page gets them escaped or as JSON, displays them as text only,
and characters that could steer the display (control characters, reordering of right-to-left text)
as their code points.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from common.errors import InputError
from data import load_image

from ..records import Row, Rows
from ..statistics import grouped, percent
from .curves import STYLE, Metrics, curve_panels, panel_svg
from .templating import ENVIRONMENT, TEMPLATES

THUMBNAIL = 160  # pixels along the longer side, at most
COLOURS = 6  # of models, in report.css
# All control characters but tab and newline, invisible ones, and what turns text around.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff]"
)


def write_report(file: Path, results: Row, cases: Rows, runs: dict[str, list[Metrics]]) -> None:
    """Render the report.

    Args:
        results: what results.json holds. What is empty, or None, has no section.
        cases: every question with the models' answers, as `evaluation.results.cases` gives them. An
            image that can't be read becomes a box that says so.
        runs: by model the rows of its run's metrics.jsonl, for the curves.
    """
    results = displayable(results)
    # The images first: their paths must be those on disk.
    pictures, cases = displayable(with_pictures(cases))
    # The seventh model has the first one's colour again.
    colour = {model["name"]: f"m{i % COLOURS}" for i, model in enumerate(results["models"])}
    answers = chain.from_iterable(case["answers"] for case in cases)
    flags = dict.fromkeys(chain.from_iterable(answer["flags"] for answer in answers))
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    # By its hash the page's policy lets this script run, and no other.
    script_hash = hashlib.sha256(script.encode()).digest()
    page = ENVIRONMENT.get_template("report.html.jinja").render(
        **_sections(results),
        early=early_panels(results["early_answering"], colour),
        results=results,
        models=list(colour),
        colour=colour,
        curves={displayable(name): curve_panels(rows) for name, rows in runs.items() if rows},
        cases=cases,
        pictures=pictures,
        flags=flags,
        style=Markup(style) + STYLE,
        script=Markup(script),
        script_hash=base64.b64encode(script_hash).decode(),
    )
    file.write_text(page, encoding="utf-8")


def displayable(value: Any) -> Any:
    """The same strings, lists and dicts, with characters that could steer the display as code
    points: ⟨U+202E⟩.

    Numbers that JSON doesn't know (NaN, infinity) become None.
    """
    if isinstance(value, str):
        return _STEERING.sub(_code_point, value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        return {displayable(key): displayable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [displayable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _code_point(match: re.Match[str]) -> str:
    return f"⟨U+{ord(match[0]):04X}⟩"


def with_pictures(cases: Rows) -> tuple[Rows, Rows]:
    """The distinct images as `picture` gives them, and the cases with their places in that list for
    "images".
    """
    places: dict[str, int] = {}
    placed = []
    for case in cases:
        placed.append(
            case | {"images": [places.setdefault(path, len(places)) for path in case["images"]]}
        )
    # disable=None: no bar where nobody watches, that is, where stderr is no terminal.
    bar = tqdm(places, "thumbnails", unit="image", leave=False, disable=None)
    return [picture(path) for path in bar], placed


def picture(path: str) -> Row:
    """{"name", "src" (a data URI of at most 160 pixels a side), "width", "height" (of the file)};
    {"name", "why"} if the image can't be read.
    """
    # Not the whole path: a page is passed on; where its maker keeps files is not.
    name = "/".join(Path(path).parts[-2:])
    try:
        image = load_image(path)
    except InputError as error:
        return {"name": name, "why": str(error).removeprefix(f"{path}: ").replace(path, name)}
    width, height = image.size
    # In place; a small image stays as it is.
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"name": name, "src": f"data:image/webp;base64,{data}", "width": width, "height": height}


def _sections(results: Row) -> Row:
    """What the template looks up: rows by model and modality, ..."""
    whole = [row for row in results["accuracy"] if row["question_type"] is None]
    modalities = {row["modality"]: row["n"] for row in whole}
    samples = results["samples"]
    guesses = [results["blind"], *results["ablated"].values()]
    best_blind = dict.fromkeys(modalities, 0.0)
    for rates in chain.from_iterable(guess.values() for guess in guesses):
        for modality, rate in rates.items():
            best_blind[modality] = max(rate, best_blind.get(modality, 0.0))
    return {
        "modalities": modalities,
        "verdict": verdict(results, whole),
        "accuracy": _by(results["accuracy"], "question_type", "model", "modality"),
        "pairs": pair_rows(results),
        "sampled": _by(samples["table"] if samples else [], "model", "modality"),
        "best_blind": best_blind,
        "faithful": _by(results["faithfulness"], "check", "model"),
    }


def verdict(results: Row, whole: Rows) -> list[str]:
    """In sentences: where each model is above the best guess without the image, and what the last
    model is against each other.
    """
    sentences = []
    for model in results["models"]:
        rows = [row for row in whole if row["model"] == model["name"]]
        above = [_against(row) for row in rows if row["sees"]]
        others = [_against(row) for row in rows if not row["sees"]]
        if above:
            finding = f"is above the best guess without the image on {_listed(above)}"
            if others:
                finding += f"; on {_listed(others)} there is no evidence of seeing"
        else:
            finding = f"shows no evidence of seeing on {_listed(others, 'or')}"
        sentences.append(f"{model['name']} {finding}.")
    return sentences + comparison(results)


def comparison(results: Row) -> list[str]:
    """The last model against each other one: better, worse or neither, where McNemar's p is below
    0.01.
    """
    sentences = []
    for (first, second), rows in pair_rows(results).items():
        if first != results["models"][-1]["name"]:  # of its own pairs the last model is the first
            continue
        where: dict[str, list[str]] = {"better": [], "worse": [], "not measurably different": []}
        for row in rows:
            outcome = "better" if row["only_first"] > row["only_second"] else "worse"
            if row["p"] >= 0.01:
                outcome = "not measurably different"
            where[outcome].append(row["modality"])
        parts = [f"{outcome} on {_listed(names)}" for outcome, names in where.items() if names]
        sentences.append(f"Against {second}, {first} is {_listed(parts)}.")
    return sentences


def _against(row: Row) -> str:
    rates = f"{percent(row['rate'])}\u00a0% against {percent(row['best_blind_rate'])}\u00a0%"
    return f"{row['modality']} ({rates})"


def _listed(texts: Sequence[str], word: str = "and") -> str:
    """a, b and c."""
    *first, last = texts
    return f"{', '.join(first)} {word} {last}" if first else last


def pair_rows(results: Row) -> dict[tuple[str, str], Rows]:
    """By first and second model a row for each modality."""
    models = ((row["first"], row["second"]) for row in results["pairs"])
    return grouped(models, results["pairs"])


def early_panels(early: dict[str, Rows], colour: dict[str, str]) -> list[Markup]:
    """Two panels over the share of the reasoning that is kept, or none: answers that change,
    answers that are right.
    """
    titles = {"changed": "Answer differs from the final one (%)", "right": "Right answer (%)"}
    panels = []
    for name, title in titles.items():
        series = []
        for model, rows in early.items():
            points = [(100 * row["kept"], 100 * row[name]) for row in rows]
            if points:  # none from a model that does not reason
                series.append(("", colour[model], points))
        if series:
            panels.append(panel_svg(title, series, unit="% of the reasoning kept", top=100.0))
    return panels


def _by(rows: Rows, *names: str) -> dict[tuple[str, ...], Row]:
    return {tuple(row[name] for name in names): row for row in rows}
