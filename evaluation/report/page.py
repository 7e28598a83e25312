"""What an evaluation found, as one HTML file that needs nothing but itself: the table, the audits,
and every case.

Nothing is loaded over a network, and the page's own policy forbids it. Completions, questions and
names of files are hostile text: the page gets them escaped or as JSON, shows them as text only, and
characters that could steer the display (control characters, reordering of right-to-left text) as
their code points.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from tqdm import tqdm

from common.errors import InputError
from data import load_image

from . import curves

Row = dict[str, Any]

THUMBNAIL = 160  # pixels along the longer side, at most
COLOURS = 6  # of models, in report.css
LISTED_PAIRS = 50  # of leakage
TEMPLATES = Path(__file__).parent / "templates"
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
OPTIONAL = {"train_modality": None, "train_questions": None, "files": [], "contract": {}}
BLIND_NAMES = {
    "chance": "chance: any of the options",
    "most_frequent_letter": "the most frequent letter of training",
    "text_prior": "the option text most often right in training",
    "punctuation": "the option that alone has, or lacks, a full stop",
    "length": "the longest or the shortest option",
}


def write_report(
    file: Path, results: Row, cases: Sequence[Row], runs: dict[str, list[Row]]
) -> None:
    """Render the report.

    Args:
        results: what results.json holds: "name", "models" and "accuracy"; all else may be absent,
            None or empty.
        cases: every question with the models' answers, as `evaluation.results.cases` gives them. An
            image that can't be read becomes a box that says so.
        runs: by model the rows of its run's metrics.jsonl, for the curves.
    """
    results = OPTIONAL | shown(results)
    pictures, cases = shown(with_pictures(cases))
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8") + curves.STYLE
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # keys in their order
    environment.filters |= {
        "percent": percent,
        "p_value": p_value,
        "words": lambda name: name.replace("_", " "),
    }
    whole = [row for row in results["accuracy"] if row["question_type"] is None]
    types = [row for row in results["accuracy"] if row["question_type"] is not None]
    modalities = _distinct(whole, "modality")
    answers = [answer for case in cases for answer in case["answers"]]
    colour = {model["name"]: f"m{place % COLOURS}" for place, model in enumerate(results["models"])}
    blind = blind_rows(results)
    page = environment.get_template("report.html.jinja").render(
        results=results,
        models=list(colour),
        colour=colour,
        modalities=modalities,
        counts={row["modality"]: row["n"] for row in whole},
        verdict=verdict(results, whole),
        whole=_by(whole, "model", "modality"),
        types=_distinct(types, "question_type"),
        by_type=_by(types, "question_type", "model", "modality"),
        pairs=pair_rows(results),
        blind=blind,
        best_blind={
            name: max((rates.get(name) or 0.0 for *_, rates in blind), default=0.0)
            for name in modalities
        },
        checks=faithfulness_checks(results.get("faithfulness") or []),
        faithful=_by(results.get("faithfulness") or [], "check", "model"),
        early=early_panels(results, colour),
        leakage=results.get("leakage"),
        listed_pairs=LISTED_PAIRS,
        samples=results.get("samples"),
        sampled=_by((results.get("samples") or {}).get("table", []), "model", "modality"),
        curves={
            shown(name): [Markup(svg) for svg in curves.curve_panels(rows)]
            for name, rows in runs.items()
            if rows
        },
        cases=cases,
        pictures=pictures,
        case_modalities=_distinct(cases, "modality"),
        case_types=sorted(kind for kind in _distinct(cases, "question_type") if kind),
        flags=list(dict.fromkeys(flag for answer in answers for flag in answer.get("flags") or [])),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    file.write_text(page, encoding="utf-8")


def shown(value: Any) -> Any:
    """The same strings, lists and dicts, with characters that could steer the display as code
    points: ⟨U+202E⟩.

    Numbers that JSON doesn't know (NaN, infinity) become None.
    """
    if isinstance(value, str):
        return _STEERING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        return {shown(key): shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shown(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_pictures(cases: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The distinct images as `picture` gives them, and the cases with their places in that list for
    "images".
    """
    paths = list(dict.fromkeys(path for case in cases for path in case["images"]))
    places = {path: place for place, path in enumerate(paths)}
    read = tqdm(
        paths, desc="thumbnails", unit="image", dynamic_ncols=True, leave=False, disable=not paths
    )
    placed = [{**case, "images": [places[path] for path in case["images"]]} for case in cases]
    return [picture(path) for path in read], placed


def picture(path: str) -> Row:
    """{"name", "src" (a data URI of at most 160 pixels a side), "width", "height" (of the file)};
    {"name", "why"} if the image can't be read.
    """
    name = "/".join(Path(path).parts[-2:])
    try:
        image = load_image(path)
    except InputError as error:
        return {"name": name, "why": str(error).removeprefix(f"{path}: ").replace(path, name)}
    width, height = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"name": name, "src": f"data:image/webp;base64,{data}", "width": width, "height": height}


def verdict(results: Row, whole: Sequence[Row]) -> list[Markup]:
    """In sentences: where each model is above the best guess without the image, and which model is
    better.
    """
    sentences = []
    for model in results["models"]:
        rows = [row for row in whole if row["model"] == model["name"]]
        seen, unseen = (
            [_against(row) for row in rows if bool(row["sees"]) == sees] for sees in (True, False)
        )
        above = Markup("<b>{}</b> is above the best guess without the image on {}").format(
            model["name"], _listed(seen)
        )
        if seen and unseen:
            sentences.append(
                above
                + Markup("; on {} there is <b>no evidence of seeing</b>.").format(_listed(unseen))
            )
        elif seen:
            sentences.append(above + ".")
        elif unseen:
            text = Markup("<b>{}</b> shows <b>no evidence of seeing</b> on {}.")
            sentences.append(text.format(model["name"], _listed(unseen, "or")))
    return sentences + comparison(results)


def comparison(results: Row) -> list[Markup]:
    """The last model against each other one: better, worse or neither, where McNemar's p is below
    0.01.
    """
    last = results["models"][-1]["name"]
    found: dict[Markup, list[Markup]] = {}
    for (first, second), rows in pair_rows(results).items():
        if first == last:
            outcomes = {"better": [], "worse": [], "not measurably different": []}
            for row in rows.values():
                ahead = "better" if row["only_first"] > row["only_second"] else "worse"
                outcomes[ahead if row["p"] < 0.01 else "not measurably different"].append(
                    escape(row["modality"])
                )
            parts = [
                Markup("{} on {}").format(how, _listed(names))
                for how, names in outcomes.items()
                if names
            ]
            found.setdefault(_listed(parts), []).append(escape(second))
    return [
        Markup("Against {}, {} is {}.").format(_listed(names), last, outcome)
        for outcome, names in found.items()
    ]


def _against(row: Row) -> Markup:
    return Markup("{} ({}\u00a0% against {}\u00a0%)").format(
        row["modality"], percent(row["rate"]), percent(row["best_blind_rate"])
    )


def _listed(parts: Sequence[Markup], word: str = "and") -> Markup:
    """a, b and c."""
    return (
        Markup(", ").join(parts[:-1]) + (f" {word} " if len(parts) > 1 else "") + parts[-1]
        if parts
        else Markup()
    )


def blind_rows(results: Row) -> list[tuple[str | None, str, dict[str, float]]]:
    """(model, name, rate by modality): the baselines that see text only, then each model without
    its image.
    """
    rows = [
        (None, BLIND_NAMES.get(name, name), rates)
        for name, rates in (results.get("blind") or {}).items()
    ]
    for model, probes in (results.get("ablated") or {}).items():
        rows += [(model, probe, rates) for probe, rates in probes.items()]
    return rows


def pair_rows(results: Row) -> dict[tuple[str, str], dict[str, Row]]:
    """(first model, second model) -> modality -> row."""
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.get("pairs") or []:
        pairs.setdefault((row["first"], row["second"]), {})[row["modality"]] = row
    return pairs


def faithfulness_checks(rows: Sequence[Row]) -> dict[str, str | None]:
    """Check -> what it means; None where that differs from model to model."""
    meanings: dict[str, set[str]] = {}
    for row in rows:
        meanings.setdefault(row["check"], set()).add(row["meaning"])
    return {
        check: next(iter(found)) if len(found) == 1 else None for check, found in meanings.items()
    }


def early_panels(results: Row, colour: dict[str, str]) -> list[Markup]:
    """Two panels over the share of the reasoning that is kept, or none: answers that change,
    answers that are right.
    """
    early = results.get("early_answering") or {}
    lines = {colour[name]: early[name] for name in colour if early.get(name)}
    titles = {"changed": "Answer differs from the final one (%)", "right": "Right answer (%)"}
    return [
        Markup(curves.panel_svg(title, [
            ("", colour, [(100 * row["kept"], 100 * row[name]) for row in rows]) for colour, rows in lines.items()
        ], unit="% of the reasoning kept", top=100.0))
        for name, title in (titles.items() if lines else ())
    ]  # fmt: skip


def percent(rate: float | None, digits: int = 1) -> str:
    """0.5 -> "50.0"; None, which was not measured, a dash."""
    return "–" if rate is None else f"{100 * rate:.{digits}f}"


def p_value(p: float) -> str:
    """ "p < 0.001", "p = 0.045"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def _by(rows: Sequence[Row], *names: str) -> dict[Any, Row]:
    return {tuple(row[name] for name in names): row for row in rows}


def _distinct(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))
