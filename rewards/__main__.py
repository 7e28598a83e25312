"""`python -m rewards "<completion>" --answer B [--options TEXT ...]`: each rule's score of one
completion, and why.

The completion `-` is read from standard input. Exit code 2 and one line if the arguments are wrong.
Completions are hostile text: only escaped excerpts of them are printed.
"""

import argparse
import sys
from typing import NoReturn

from .scoring import score


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.encode('unicode_escape').decode()}\n")


def main(arguments: list[str] | None = None) -> None:
    """Print one line a rule: its name, its score, and why."""
    parser = _Parser(
        prog="python -m rewards",
        description="Score one completion with every reward rule, and say why.",
    )
    parser.add_argument("--answer", required=True, help="the right option's letter, A to J")
    parser.add_argument(
        "completion", help="the completion to score, or - to read it from standard input"
    )
    parser.add_argument(
        "--options", nargs="+", metavar="TEXT", help="the options' texts, for the consistency rule"
    )
    given = parser.parse_args(arguments)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # excerpts may hold letters that the terminal's encoding lacks
    completion = sys.stdin.read() if given.completion == "-" else given.completion
    try:
        verdicts = score(completion, given.answer, given.options or ())
    except ValueError as error:
        parser.error(f"--answer: {error}")
    for verdict in verdicts:
        if given.options or verdict.rule != "consistency":
            print(f"{verdict.rule:<13}{verdict.score:.1f}  {verdict.why}")


if __name__ == "__main__":
    main()
