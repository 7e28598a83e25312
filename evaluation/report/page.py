"""Write an evaluation's results as one self-contained HTML file: the table, the audits, and every
case.

The page loads nothing over a network; its content security policy forbids it. Completions,
questions and file names are hostile text: they enter the page escaped or as JSON and are displayed
as text only. Characters that could affect the display (control characters, bidirectional overrides)
are shown as code points.
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
# Control characters other than tab and newline, invisible ones, bidirectional ones, surrogates.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff]"
)


def write_report(file: Path, results: Row, cases: Rows, runs: dict[str, list[Metrics]]) -> None:
    """Render the report.

    Args:
        results: the content of results.json. Empty or None entries get no section.
        cases: every question with the models' answers, from `evaluation.results.cases`. An image
            that can't be read is replaced by a box with the reason.
        runs: the rows of each model's metrics.jsonl, for the curves.
    """
    results = displayable(results)
    # Load the images first: `displayable` may change their paths.
    pictures, cases = displayable(with_pictures(cases))
    # The seventh model repeats the first one's colour.
    colour = {model["name"]: f"m{i % COLOURS}" for i, model in enumerate(results["models"])}
    answers = chain.from_iterable(case["answers"] for case in cases)
    flags = dict.fromkeys(chain.from_iterable(answer["flags"] for answer in answers))
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    # The page's policy lets only the script with this hash run.
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
    """The same strings, lists and dicts, with characters that could affect the display replaced by
    their code points: ⟨U+202E⟩. NaN and infinity, which JSON lacks, become None.
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
    """The distinct images, from `picture`, and the cases with their indices as "images"."""
    places: dict[str, int] = {}
    placed = []
    for case in cases:
        placed.append(
            case | {"images": [places.setdefault(path, len(places)) for path in case["images"]]}
        )
    # disable=None: no bar if stderr is not a terminal.
    bar = tqdm(places, "thumbnails", unit="image", leave=False, disable=None)
    return [picture(path) for path in bar], placed


def picture(path: str) -> Row:
    """{"name", "src" (a data URI of at most 160 pixels a side), "width", "height" (of the file)};
    or {"name", "why"} if the image can't be read.
    """
    # Not the whole path: pages are shared, and should not reveal their author's folders.
    name = "/".join(Path(path).parts[-2:])
    try:
        image = load_image(path)
    except InputError as error:
        return {"name": name, "why": str(error).removeprefix(f"{path}: ").replace(path, name)}
    width, height = image.size
    # In place; small images are not enlarged.
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"name": name, "src": f"data:image/webp;base64,{data}", "width": width, "height": height}


def _sections(results: Row) -> Row:
    """The tables that the template looks rows up in, by model, modality and so on."""
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
    """Sentences on where each model is above the best guess without the image, and on how the last
    model compares with each other one.
    """
    sentences = []
    for model in results["models"]:
        rows = [row for row in whole if row["model"] == model["name"]]
        above = [_rates(row) for row in rows if row["sees"]]
        others = [_rates(row) for row in rows if not row["sees"]]
        if above:
            finding = f"is above the best guess without the image on {_listed(above)}"
            if others:
                finding += f"; on {_listed(others)} there is no evidence of seeing"
        else:
            finding = f"shows no evidence of seeing on {_listed(others, 'or')}"
        sentences.append(f"{model['name']} {finding}.")
    return sentences + comparison(results)


def comparison(results: Row) -> list[str]:
    """Sentences on the last model and each other one: better or worse where McNemar's p is below
    0.01, otherwise not significantly different.
    """
    sentences = []
    for (first, second), rows in pair_rows(results).items():
        if first != results["models"][-1]["name"]:  # the last model comes first in its pairs
            continue
        where: dict[str, list[str]] = {"better": [], "worse": [], "not significantly different": []}
        for row in rows:
            outcome = "better" if row["only_first"] > row["only_second"] else "worse"
            if row["p"] >= 0.01:
                outcome = "not significantly different"
            where[outcome].append(row["modality"])
        outcomes = [f"{outcome} on {_listed(names)}" for outcome, names in where.items() if names]
        sentences.append(f"Compared with {second}, {first} is {_listed(outcomes)}.")
    return sentences


def _rates(row: Row) -> str:
    rates = f"{percent(row['rate'])}\u00a0% vs. {percent(row['best_blind_rate'])}\u00a0%"
    return f"{row['modality']} ({rates})"


def _listed(texts: Sequence[str], word: str = "and") -> str:
    """ "a, b and c"."""
    *first, last = texts
    return f"{', '.join(first)} {word} {last}" if first else last


def pair_rows(results: Row) -> dict[tuple[str, str], Rows]:
    """(first model, second model) -> a row for each modality."""
    models = ((row["first"], row["second"]) for row in results["pairs"])
    return grouped(models, results["pairs"])


def early_panels(early: dict[str, Rows], colour: dict[str, str]) -> list[Markup]:
    """Two panels over the share of the reasoning that is kept: answers that change, and right
    answers. Empty if no model reasons.
    """
    titles = {"changed": "Answer differs from the final one (%)", "right": "Right answer (%)"}
    panels = []
    for name, title in titles.items():
        series = []
        for model, rows in early.items():
            points = [(100 * row["kept"], 100 * row[name]) for row in rows]
            if points:  # a model that does not reason has none
                series.append(("", colour[model], points))
        if series:
            panels.append(panel_svg(title, series, unit="% of the reasoning kept", top=100.0))
    return panels


def _by(rows: Rows, *names: str) -> dict[tuple[str, ...], Row]:
    return {tuple(row[name] for name in names): row for row in rows}
