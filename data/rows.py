"""One row of a question file: checked access to its fields, with errors that name the place."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.errors import InputError

LONGEST_TEXT = 20_000  # characters of one field: several times a long clinical case
_KINDS = {
    list: "a list",
    dict: "an object",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
"""How error messages call the values of a JSON file."""


@dataclass(frozen=True, slots=True)
class Row:
    """One object in a question file.

    Attributes:
        fields: the object itself.
        file: the question file.
        place: "row 12" or "line 12".
        image_root: resolved folder that no image path may leave.
        check_images: whether every image must exist.
    """

    fields: dict[str, Any]
    file: Path
    place: str
    image_root: Path
    check_images: bool

    def __post_init__(self) -> None:
        if not isinstance(self.fields, dict):
            raise InputError(
                f"{self.file} {self.place}: this is {_KINDS[type(self.fields)]}: give an object "
                "with `question`, `options`, ..."
            )

    @property
    def source(self) -> str:
        return f"{self.file.name} {self.place}"

    def fail(self, field: str, problem: str, remedy: str) -> NoReturn:
        raise InputError(f"{self.file} {self.place}: `{field}` {problem}: {remedy}")

    def has(self, field: str) -> bool:
        """Whether the field has a value; null and "" count as missing."""
        return self.fields.get(field) not in (None, "")

    def string(self, field: str) -> str:
        """The field's text without surrounding white space, which must not be empty."""
        return self._text(field, self._value(field))

    def optional_string(self, field: str) -> str:
        """The field's text, or "" if the field is missing."""
        return self.string(field) if self.has(field) else ""

    def strings(self, field: str) -> tuple[str, ...]:
        """The field's list of texts, which must not be empty."""
        values = self._value(field)
        if not values or not isinstance(values, list):
            self.fail(field, f"is {_KINDS[type(values)]}", "give a list of at least one text")
        return tuple(self._text(field, value) for value in values)

    def images(self, field: str) -> tuple[Path, ...]:
        """The resolved paths of the field's image or list of images, all in the image folder."""
        single = isinstance(self.fields.get(field), str)
        names = (self.string(field),) if single else self.strings(field)
        return tuple(self._image(field, name) for name in names)

    def _image(self, field: str, name: str) -> Path:
        # Follow links first: a link inside the folder may lead out of it.
        resolved = Path(os.path.realpath(self.image_root / name))
        if ".." in Path(name).parts or not resolved.is_relative_to(self.image_root):
            problem = f"leaves the image folder ({name!r} is {resolved})"
            self.fail(field, problem, f"copy the image into {self.image_root}")
        if self.check_images and not os.path.isfile(resolved):
            remedy = "add it, or correct the path or the image folder"
            self.fail(field, f"names a missing image, {resolved}", remedy)
        return resolved

    def _value(self, field: str) -> Any:
        if field not in self.fields:
            self.fail(field, "is missing", f"add it (this row has {sorted(self.fields)})")
        return self.fields[field]

    def _text(self, field: str, value: Any) -> str:
        if not isinstance(value, str):
            self.fail(field, f"holds {_KINDS[type(value)]}", "give a text")
        text = value.strip()
        if not text:
            self.fail(field, "holds no text", "give a text")
        if len(text) > LONGEST_TEXT:
            self.fail(field, f"holds {len(text):,} characters", f"shorten it to {LONGEST_TEXT:,}")
        # No file name can contain these, and no tokenizer accepts a surrogate.
        if re.search("[\0\ud800-\udfff]", text):
            self.fail(
                field, "holds NUL or half of a surrogate pair", "give text that UTF-8 can encode"
            )
        return text
