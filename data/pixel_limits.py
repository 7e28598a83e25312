"""The limits of an image's area that belong to a checkpoint: "min_pixels" and "max_pixels" of its
preprocessor_config.json, which transformers obeys too.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json

FILE = "preprocessor_config.json"
# What transformers calls them where it writes the file itself: {"size": {"shortest_edge": ...}}.
_SIZE_NAMES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def with_pixel_limits(
    companions: dict[str, bytes], min_pixels: int, max_pixels: int
) -> dict[str, bytes]:
    """The companion files of a checkpoint (`model.weights.read_companions`) with these limits.

    A trained model carries the limits that it was trained with, so that whoever loads it, here or
    elsewhere, shows it images as it knows them. Without the file one is made that says no more.

    Raises:
        InputError: the file is no JSON object.
    """
    written = companions.get(FILE, b'{"image_processor_type": "Qwen2VLImageProcessor"}')
    try:
        raw = dict(json.loads(written))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{FILE} of the base model: not a JSON object ({error}); mend it"
        ) from None
    raw.pop("size", None)  # the other place of the same limits
    raw |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return companions | {FILE: (json.dumps(raw, indent=2) + "\n").encode()}


def read_pixel_limits(folder: Path) -> dict[str, int]:
    """Those of "min_pixels" and "max_pixels" that a checkpoint folder knows.

    Raises:
        InputError: its preprocessor_config.json is no JSON object, or a limit is no whole number.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    remedy = "mend it, or copy or download it again"
    raw: Any = read_json(file, remedy)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: not a JSON object; {remedy}")
    size = raw.get("size")
    limits = {}
    for name, size_name in _SIZE_NAMES.items():
        limit = raw.get(name) or (size.get(size_name) if isinstance(size, dict) else None)
        if limit is not None and type(limit) is not int:
            raise InputError(f"{file}: {name} is {limit!r}, not a whole number; {remedy}")
        if limit is not None:
            limits[name] = limit
    return limits
