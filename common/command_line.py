"""The command line of a run: `--config FILE`, and every field of the config as a flag, explained in
its own words.
"""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from .config import Config, load_config
from .errors import InputError


def parse_arguments(
    description: str, arguments: Sequence[str] | None = None
) -> tuple[Config, bool]:
    """The command line, `--config FILE [--field value ...] [--dry-run]`; `arguments` default to the
    program's own.

    Returns the config, and whether its plan alone is wanted.
    """
    parser = config_parser(description, [field.name for field in fields(Config)])
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print what the run would read, the memory, time and disk that it would take, and do nothing",
    )  # fmt: skip
    given = vars(parser.parse_args(arguments))
    if given["config"] is None:
        raise InputError("--config FILE is missing; configs/ has those that come along")
    return config_of(given), given["dry_run"]


def config_of(given: dict[str, Any]) -> Config:
    """The config of parsed arguments, which may hold others beside."""
    names = {field.name for field in fields(Config)} & given.keys()
    return load_config(
        given["config"],
        {k: tuple(given[k]) if isinstance(given[k], list) else given[k] for k in names},
    )


def config_parser(description: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of `--config FILE` and of the config's fields `names`; one that is not given is not
    in the result.
    """
    parser = _OneLineParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of a run, with any field of common/config.py"
    )
    helps = _field_docstrings()
    for field in (field for field in fields(Config) if field.name in names):
        default = "required, here or in the file" if field.default is MISSING else field.default
        extra = {"nargs": "*"} if field.type == tuple[str, ...] else {}
        kind = str if extra else _boolean if field.type is bool else field.type
        # The default shown is the dataclass's; the one parsed is "not given", so that the file's
        # value stands.
        text = f"{helps[field.name]} (default: {default})".replace("%", "%%")
        parser.add_argument(
            f"--{field.name}",
            type=kind,
            metavar=kind.__name__.strip("_").upper(),
            help=text,
            default=argparse.SUPPRESS,
            **extra,
        )
    return parser


def _boolean(text: str) -> bool:
    """As TOML writes it. Argparse wants a ValueError for anything else."""
    return bool(("false", "true").index(text))


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help; fields are written with _)")


def _field_docstrings() -> dict[str, str]:
    """The string under each field, read from the source: what explains a field to a reader explains
    it in --help.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(Config))).body[0].body
    pairs = zip(body, body[1:])
    return {
        a.target.id: b.value.value
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    }
