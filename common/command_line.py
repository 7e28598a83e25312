"""The command line of a run: `--config FILE`, and a flag for every field of the config."""

import argparse
import ast
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, get_origin

from .config import HEADINGS, Config, load_config
from .errors import InputError

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "presets"


def parse_arguments(
    description: str, arguments: Sequence[str] | None = None
) -> tuple[Config, bool]:
    """Parse `--config FILE [--preset NAME] [--field value ...] [--dry-run]`, by default from
    `sys.argv`.

    Returns the config, and whether `--dry-run` was given.
    """
    parser = config_parser(description, [one.name for one in fields(Config)])
    names = sorted(file.stem for file in PRESETS.glob("*.toml"))
    preset_help = f"set all knobs of the method after a paper: {', '.join(names)}; "
    preset_help += "configs/presets/ says which knobs, and where the paper differs"
    parser.add_argument("--preset", choices=names, metavar="NAME", help=preset_help)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the run's data and the memory, time and disk space it needs; train nothing",
    )
    given = vars(parser.parse_args(arguments))
    if given["config"] is None:
        raise InputError("--config FILE is missing; configs/ has examples")
    return config_of(given), given["dry_run"]


def config_of(given: dict[str, Any]) -> Config:
    """The config from parsed arguments, which may include others."""
    overrides = {}
    for one in fields(Config):
        if one.name in given:
            value = given[one.name]
            overrides[one.name] = tuple(value) if isinstance(value, list) else value
    presets = []
    if given.get("preset"):  # the first sets every knob, so that none of the file's is left
        presets = [PRESETS / "grpo.toml", PRESETS / f"{given['preset']}.toml"]
    config = load_config(given["config"], overrides, presets)
    if presets and config.method != "grpo":
        raise InputError("--preset sets the knobs of GRPO, but the config has method = sft")
    return config


def config_parser(description: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for `--config FILE` and the config fields `names`.

    Fields that are not given are absent from the result, so that the file's values apply.
    """
    layout = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the description
    parser = _OneLineParser(description=description, formatter_class=layout, allow_abbrev=False)
    file_help = "TOML file with any of the fields below (see common/config.py)"
    parser.add_argument("--config", metavar="FILE", help=file_help)
    for heading in HEADINGS:
        helps = _field_docstrings(heading)
        group = parser.add_argument_group(f"{heading.__name__.lower()}: {heading.__doc__}")
        for one in fields(heading):
            if one.name in names:
                group.add_argument(
                    f"--{one.name}", **_argument(one.type, one.default, helps[one.name])
                )
    return parser


def _argument(kind: Any, default: Any, description: str) -> dict[str, Any]:
    """The arguments of `add_argument` for a field."""
    several = get_origin(kind) is tuple
    default_text = "required, here or in the file" if default is MISSING else default
    parse: Any = str if several else _boolean if kind is bool else kind
    argument = {
        "type": parse,
        "metavar": parse.__name__.strip("_").upper(),
        "help": f"{description} (default: {default_text})".replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    return argument | ({"nargs": "*"} if several else {})


def _boolean(text: str) -> bool:
    """Parse a boolean as TOML writes it. Argparse expects a ValueError for anything else."""
    return bool(("false", "true").index(text))


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(
            f"{message} (see {self.prog} --help; fields have underscores, not hyphens)"
        )


def _field_docstrings(heading: type) -> dict[str, str]:
    """The string under each field, read from the source, so that --help shows the same text."""
    (definition,) = ast.parse(inspect.getsource(heading)).body
    assert isinstance(definition, ast.ClassDef)
    helps = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(below.value, ast.Constant)
            helps[statement.target.id] = " ".join(str(below.value.value).split())
    return helps
