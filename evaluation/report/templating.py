"""The Jinja environment for the templates of pages and pictures."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..statistics import percent

TEMPLATES = Path(__file__).parent / "templates"

ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,  # for every file extension, because completions are hostile text
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["percent"] = percent
# Compact, with the keys unsorted, so that rules and probes keep their order.
ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
