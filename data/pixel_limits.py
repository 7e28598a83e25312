"""A checkpoint's limits on image area: "min_pixels" and "max_pixels" in preprocessor_config.json,
which transformers obeys too.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json
from model.weights import read_companions

FILE = "preprocessor_config.json"
_REMEDY = "fix it, or copy or download it again"
# The names that transformers uses when it writes the file: {"size": {"shortest_edge": ...}}.
_SIZE_NAMES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def with_pixel_limits(folder: Path, min_pixels: int, max_pixels: int) -> dict[str, bytes]:
    """The companion files of a checkpoint folder (`read_companions`), with these limits set.

    A trained model carries the limits it was trained with, so that it gets images of the same sizes
    wherever it is loaded. If the file is missing, a new one holds just the limits.

    Raises:
        InputError: the file is not a JSON object.
    """
    raw = _fields(folder) or {"image_processor_type": "Qwen2VLImageProcessor"}
    raw.pop("size", None)  # the other place for the same limits
    raw |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return read_companions(folder) | {FILE: (json.dumps(raw, indent=2) + "\n").encode()}


def read_pixel_limits(folder: Path) -> dict[str, int]:
    """The "min_pixels" and "max_pixels" of a checkpoint folder, each only if it is set.

    Raises:
        InputError: preprocessor_config.json is not a JSON object, or a limit is not a whole number.
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
    """The fields of the file; none if there is no file."""
    file = folder / FILE
    if not file.exists():
        return {}
    raw = read_json(file, _REMEDY)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: not a JSON object; {_REMEDY}")
    return raw
