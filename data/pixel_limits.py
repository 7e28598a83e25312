"""The limits of an image's area that belong to a checkpoint: "min_pixels" and "max_pixels" of its
preprocessor_config.json, which transformers obeys too.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json
from model.weights import read_companions

FILE = "preprocessor_config.json"
_REMEDY = "mend it, or copy or download it again"
# What transformers calls them where it writes the file itself: {"size": {"shortest_edge": ...}}.
_SIZE_NAMES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def with_pixel_limits(folder: Path, min_pixels: int, max_pixels: int) -> dict[str, bytes]:
    """The companion files of a checkpoint folder (`read_companions`) with these limits.

    A trained model carries the limits that it was trained with, so that whoever loads it, here or
    elsewhere, shows it images as it knows them. Without the file one is made that says no more.

    Raises:
        InputError: the file is no JSON object.
    """
    raw = _fields(folder) or {"image_processor_type": "Qwen2VLImageProcessor"}
    raw.pop("size", None)  # the other place of the same limits
    raw |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return read_companions(folder) | {FILE: (json.dumps(raw, indent=2) + "\n").encode()}


def read_pixel_limits(folder: Path) -> dict[str, int]:
    """Those of "min_pixels" and "max_pixels" that a checkpoint folder knows.

    Raises:
        InputError: its preprocessor_config.json is no JSON object, or a limit is no whole number.
    """
    raw = _fields(folder)
    size = raw.get("size")
    limits = {}
    for name, size_name in _SIZE_NAMES.items():
        limit = raw.get(name) or (size.get(size_name) if isinstance(size, dict) else None)
        if limit is not None and type(limit) is not int:
            file = folder / FILE
            raise InputError(f"{file}: {name} is {limit!r}, not a whole number; {_REMEDY}")
        if limit is not None:
            limits[name] = limit
    return limits


def _fields(folder: Path) -> dict[str, Any]:
    """Those of the file, none where there is no file."""
    file = folder / FILE
    if not file.exists():
        return {}
    raw = read_json(file, _REMEDY)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: not a JSON object; {_REMEDY}")
    return raw
