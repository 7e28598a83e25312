"""One row of a question file: its fields, checked, with errors that say where they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.errors import InputError

LONGEST_TEXT = 20_000  # characters of one field: several times a long clinical case


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a question file.

    Attributes:
        fields: the object itself.
        file: the question file.
        place: "row 12" or "line 12".
        image_root: resolved folder that no image path may leave.
        check_images: whether an image must exist.
    """

    fields: dict[str, Any]
    file: Path
    place: str
    image_root: Path
    check_images: bool

    def __post_init__(self) -> None:
        if not isinstance(self.fields, dict):
            raise InputError(
                f"{self.file} {self.place}: is {_kind(self.fields)}: give an object with `question`, `options`, ..."
            )

    @property
    def source(self) -> str:
        return f"{self.file.name} {self.place}"

    def fail(self, field: str, problem: str, remedy: str) -> NoReturn:
        raise InputError(f"{self.file} {self.place}: `{field}` {problem}: {remedy}")

    def has(self, field: str) -> bool:
        """Whether the field is there and holds something; null and "" count as absent."""
        return self.fields.get(field) not in (None, "")

    def string(self, field: str) -> str:
        """A text that is not empty, without surrounding white space."""
        return self._text(field, self._value(field))

    def optional_string(self, field: str) -> str:
        """The text, or "" where the field is absent."""
        return self.string(field) if self.has(field) else ""

    def strings(self, field: str) -> tuple[str, ...]:
        """A list of texts, at least one."""
        values = self._value(field)
        if not isinstance(values, list) or not values:
            self.fail(field, f"is {_kind(values)}", "give a list of texts")
        return tuple(self._text(field, value) for value in values)

    def image(self, field: str, name: str) -> Path:
        """The resolved path of an image that lies in the image folder."""
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            self.fail(
                field,
                f"leaves the image folder ({name!r})",
                f"give a path relative to {self.image_root}",
            )
        try:
            resolved = (self.image_root / path).resolve()
            missing = self.check_images and not resolved.is_file()
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # too long a name, a loop of links, a NUL character
            self.fail(
                field, f"is no usable path ({name[:80]!r}, {type(error).__name__})", "correct it"
            )
        if not resolved.is_relative_to(self.image_root):
            self.fail(
                field, f"leaves the image folder ({name!r}, a link to {resolved})", "copy the image"
            )
        if missing:
            self.fail(
                field,
                f"names a missing image, {resolved}",
                "add it, or correct the path or the image folder",
            )
        return resolved

    def _value(self, field: str) -> Any:
        if field not in self.fields:
            self.fail(
                field,
                "is missing",
                f"add it (this row has {', '.join(sorted(self.fields)) or 'no field'})",
            )
        return self.fields[field]

    def _text(self, field: str, value: Any) -> str:
        text = value.strip() if isinstance(value, str) else ""
        if not text:
            self.fail(
                field,
                f"holds {'no text' if isinstance(value, str) else _kind(value)}",
                "give a text",
            )
        if len(text) > LONGEST_TEXT:
            self.fail(field, f"holds {len(text):,} characters", f"shorten it to {LONGEST_TEXT:,}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.fail(field, "holds half of a surrogate pair", "write the character whole")
        return text


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )
