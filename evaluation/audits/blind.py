"""Baselines that see no image: what the text of the questions gives away.

    python -m evaluation.audits.blind --train build/miniature/train.json --test
    build/miniature/test.json

A model that is no better than the best of them has not shown that it looks at the image. Each is
fitted on training questions only and gives every test question its *expected* credit in 0..1: 1/k
where the right option is one of k that it can't choose among, 0 where it is not.

- chance: one of the options, whichever.
- most_frequent_letter: of the letters that the question has, the one most often right in training.
- text_prior: the option whose text was most often right in training; among equals, the one least
  often wrong there; among those, the first, as a program has it that sorts by score. Fitted on 600
  MRI questions of OmniMedVQA and asked the 900 of MedVLM-R1's test set, it has 100.0 % right of
  MRI, 42.3 % of CT and 29.7 % of X-ray; if equals of the last kind share the credit, 99.8, 38.7 and
  28.2 %; if all that were right equally often do, 98.9, 33.5 and 26.0 %. This order of ties was
  chosen, of many, because it gives the figures that are known of such a rule on these files (100,
  42 and 30 %): read those of CT and X-ray as depending on a tie.
- punctuation: the option that alone ends in a full stop, or alone does not; with 2 options neither
  is odd. In those 900 questions, one of four options alone ends so 102 times, and is right 100
  times.
- length: the longest option or the shortest, whichever was more often right in training.
"""

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from common.errors import InputError
from data import Question, option_letter, read_questions

Guess = Callable[[Question], Sequence[int]]
"""The options, by index, that a baseline can't choose among."""


def blind_credits(train: Sequence[Question], test: Sequence[Question]) -> dict[str, list[float]]:
    """Of each baseline the expected credit in 0..1 of each test question, in order."""
    guesses = {name: fit(train) for name, fit in BASELINES.items()}
    return {
        name: [_credit(question, guess(question)) for question in test]
        for name, guess in guesses.items()
    }


def by_modality(
    test: Sequence[Question], credits: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """{baseline: {modality: mean credit}} of what `blind_credits` gives for the same test
    questions.
    """
    means = {}
    for name, values in credits.items():
        of: dict[str, list[float]] = {}
        for question, value in zip(test, values, strict=True):
            of.setdefault(question.modality, []).append(value)
        means[name] = {modality: fmean(each) for modality, each in of.items()}
    return means


def right_index(question: Question) -> int:
    """0 for answer A, 1 for B, ..."""
    return ord(question.answer) - ord("A")


def plain_text(text: str) -> str:
    """What two options must share to say the same: words, not case, spacing or a final full stop.

    The full stop is left to the punctuation baseline, so that each baseline measures one thing; the
    readers, too, take it for a slip of the pen.
    """
    return " ".join(text.casefold().split()).rstrip(". ")


def _credit(question: Question, chosen: Sequence[int]) -> float:
    return (right_index(question) in chosen) / len(chosen)


def _best(scores: Iterable[float | tuple[int, int]]) -> list[int]:
    """The indices of all that share the highest score."""
    scores = list(scores)
    highest = max(scores)
    return [index for index, score in enumerate(scores) if score == highest]


def _chance(train: Sequence[Question]) -> Guess:
    return lambda question: range(len(question.options))


def _most_frequent_letter(train: Sequence[Question]) -> Guess:
    right = Counter(question.answer for question in train)
    return lambda question: _best(
        right[option_letter(index)] for index in range(len(question.options))
    )


def _text_prior(train: Sequence[Question]) -> Guess:
    right, wrong = Counter(), Counter()
    for question in train:
        texts = [plain_text(option) for option in question.options]
        answer = texts[right_index(question)]
        right[answer] += 1
        wrong.update(set(texts) - {answer})

    def guess(question: Question) -> list[int]:
        texts = [plain_text(option) for option in question.options]
        first, *_ = _best((right[text], -wrong[text]) for text in texts)
        return [
            index for index, text in enumerate(texts) if text == texts[first]
        ]  # the same text twice: no telling

    return guess


def _punctuation(train: Sequence[Question]) -> Guess:
    def guess(question: Question) -> Sequence[int]:
        ends = [option.endswith(".") for option in question.options]
        odd = [index for index, end in enumerate(ends) if ends.count(end) == 1]
        return odd or range(len(ends))  # of two options each is odd, or none

    return guess


def _length(train: Sequence[Question]) -> Guess:
    guesses = [
        lambda question, sign=sign: _best(sign * len(option) for option in question.options)
        for sign in (1, -1)
    ]
    return max(
        guesses, key=lambda guess: sum(_credit(question, guess(question)) for question in train)
    )


BASELINES: dict[str, Callable[[Sequence[Question]], Guess]] = {
    "chance": _chance,
    "most_frequent_letter": _most_frequent_letter,
    "text_prior": _text_prior,
    "punctuation": _punctuation,
    "length": _length,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="blind", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--train",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="question files to fit on",
    )
    parser.add_argument(
        "--test",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="question files to answer",
    )
    arguments = parser.parse_args()
    try:
        train, test = (
            [question for file in files for question in read_questions(file, check_images=False)]
            for files in (arguments.train, arguments.test)
        )
    except InputError as error:
        print(f"blind: {error}", file=sys.stderr)
        return 2
    print(json.dumps(by_modality(test, blind_credits(train, test)), indent=2))
    return 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGPIPE, signal.SIG_DFL
    )  # who reads a pipe may leave early, as `head` does
    sys.exit(main())
