"""The one exception that means "mend what you gave me"."""


class InputError(ValueError):
    """Something given from outside (config, checkpoint, question file, image) is wrong.

    The message is one line that names the thing (file, row or field) and the remedy; the command-line programs
    print it and exit with code 2, without a traceback. Everything else that is raised is a bug of ours.
    """
