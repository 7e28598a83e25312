"""The one exception that means "mend what you gave me", and text that is safe to print."""


class InputError(ValueError):
    """Something given from outside (config, checkpoint, question file, image) is wrong.

    The message is one line that names the thing (file, row or field) and the remedy; the command-line programs
    print it and exit with code 2, without a traceback. Everything else that is raised is a bug of ours. What a message
    quotes may be hostile: it is made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text as one line, every character escaped that could steer a terminal or break the line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
