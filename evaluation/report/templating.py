"""The environment in which the templates of pages and pictures are rendered."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..statistics import percent

TEMPLATES = Path(__file__).parent / "templates"

ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,  # whatever the template's name ends in: completions are hostile text
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["percent"] = percent
# Compact, and keys in their own order: that of the options, of the rules, of the probes.
ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
