"""The one exception that means "mend what you gave me", and text that is safe to print."""

LONGEST_MESSAGE = 600  # characters: a few lines of a terminal


class InputError(ValueError):
    """Something given from outside (config, checkpoint, question file, image) is wrong.

    The message is one line that names the thing (file, row or field) and the remedy; the
    command-line programs print it and exit with code 2, without a traceback. Everything else that
    is raised is a bug of ours. What a message quotes may be hostile: it is made `printable`, and a
    message of more than `LONGEST_MESSAGE` characters loses its middle, because it begins with the
    thing and ends with the remedy.
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            _shortened(printable(_shortened(message)))
        )  # escapes make it up to ten times as long


def reason(error: Exception) -> str:
    """What a library raised, its kind and its words, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def printable(text: str) -> str:
    """The text as one line, every character escaped that could steer a terminal or break the line.

    Those are what `str.isprintable` denies: control and format characters (escape sequences,
    bidirectional overrides, zero-width ones), lone surrogates, unassigned characters, and every
    kind of blank but the space.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    half = (LONGEST_MESSAGE - 5) // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"
