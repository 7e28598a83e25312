"""`python -m rewards "<completion>" --answer B`: print each rule's score of a completion, and why.

With `-`, the completion is read from standard input. Wrong arguments print one line and exit with
code 2.
"""

import argparse
import sys
from typing import NoReturn

from .rules import score


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Escaped, because it may quote a completion that contains control characters.
        self.exit(2, f"{self.prog}: {message.encode('unicode_escape').decode()}\n")


def main() -> None:
    parser = _Parser(prog="python -m rewards", description="Score one completion, and say why.")
    parser.add_argument("completion", help="the completion, or - to read it from standard input")
    parser.add_argument("--answer", required=True, help="the right option's letter, A to J")
    arguments = parser.parse_args()
    completion = arguments.completion
    if completion == "-":
        completion = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    try:
        verdicts = score(completion, arguments.answer)
    except ValueError as error:
        parser.error(f"--answer: {error}")
    for verdict in verdicts:
        line = f"{verdict.rule:<10}{verdict.score:.1f}  {verdict.why}"
        # The line is printable, but the terminal's encoding may lack a character of the excerpt.
        print(line.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))


if __name__ == "__main__":
    main()
