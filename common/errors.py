"""The exception for bad input, and escaping of untrusted text for the terminal."""

LONGEST_MESSAGE = 600  # characters: a few lines of a terminal


class InputError(ValueError):
    """The user's input (config, checkpoint, question file, image) is wrong.

    The message is one line that names the cause (file, row or field) and the remedy; the
    command-line programs print it and exit with code 2, without a traceback. Other exceptions are
    bugs. A message may quote hostile text, so it is made `printable`. A message of more than
    `LONGEST_MESSAGE` characters is cut in the middle, because it begins with the cause and ends
    with the remedy.
    """

    def __init__(self, message: str) -> None:
        # Shortened twice, because escapes can make a text ten times as long.
        super().__init__(_shortened(printable(_shortened(message))))


def reason(error: Exception) -> str:
    """A library's exception as one line: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def printable(text: str) -> str:
    """The text as one line, with every character escaped that could control a terminal.

    These are the characters that are not `str.isprintable`: control and format characters (escape
    sequences, bidirectional overrides, zero-width characters), lone surrogates, unassigned
    characters, and all white space except the ASCII space.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    half = (LONGEST_MESSAGE - 5) // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"
