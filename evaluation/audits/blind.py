"""Blind baselines: the accuracy that the text of the questions gives without any image.

    python -m evaluation.blind --train build/miniature/train.json --test build/miniature/test.json

A model that is no better than the best of them has not shown that it looks at the image. Each
baseline scores every option, fitted on the training questions only, and chooses the option with the
highest score. Ties share the credit: a question's *expected* credit is 1/k if the right option is
one of k with the highest score, otherwise 0.

- chance: all options score the same.
- most_frequent_letter: how often the option's letter was right in training.
- text_prior: how often the option's text was right in training. Fitted on 600 MRI questions of
  OmniMedVQA, it answers 98.9 % of the MRI questions in MedVLM-R1's test set right, 33.5 % of the CT
  questions and 26.0 % of the X-ray questions.
- punctuation: whether the option is the only one that ends in a full stop, or the only one that
  does not; with 2 options, neither is odd. In 102 of those 900 questions, exactly one of four
  options ends in a full stop; it is right 100 times.
- length: the option's length, negated if the shortest option was right more often in training.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from common.program import run_program
from data import Question, read_questions
from rewards import LETTERS

from ..statistics import places_by

BASELINES = ("chance", "most_frequent_letter", "text_prior", "punctuation", "length")


Credits = dict[str, list[float]]
"""Name of a guess -> credit (0 to 1) of each question, in order."""
Rates = dict[str, dict[str, float]]
"""Name of a guess -> modality -> mean credit."""


def blind_credits(train: Sequence[Question], test: Sequence[Question]) -> Credits:
    """The expected credit (0 to 1) of each test question, in order, for each baseline."""
    letters = Counter(question.answer for question in train)
    texts = Counter(right_text(question) for question in train)
    sign = _sign_of_length(train)
    # All names from the start, so that a test set without questions has them too.
    credits: Credits = {name: [] for name in BASELINES}
    for question in test:
        options = question.options
        ends = [option.endswith(".") for option in options]
        scores = (
            [0] * len(options),
            [letters[letter] for letter in LETTERS[: len(options)]],
            [texts[plain_text(option)] for option in options],
            [int(ends.count(end) == 1) for end in ends],  # of two options, both or neither are odd
            [sign * len(option) for option in options],
        )
        for values, of_options in zip(credits.values(), scores, strict=True):
            values.append(_credit(question, of_options))
    return credits


def by_modality(test: Sequence[Question], credits: Credits) -> Rates:
    """The mean credit of each guess on each modality; `credits` are those of `test`, in order."""
    rates: Rates = {name: {} for name in credits}
    for modality, places in places_by(question.modality for question in test).items():
        for name, values in credits.items():
            rates[name][modality] = fmean(values[place] for place in places)
    return rates


def right_text(question: Question) -> str:
    """The text of the right option, normalised by `plain_text`."""
    return plain_text(question.options[_right(question)])


def plain_text(text: str) -> str:
    """Normalise a text for comparison: case, spacing and final full stops are ignored.

    Full stops are left to the punctuation baseline, so that each baseline measures one thing. The
    question readers ignore them too.
    """
    return " ".join(text.casefold().split()).rstrip(". ")


def _right(question: Question) -> int:
    return LETTERS.index(question.answer)


def _credit(question: Question, scores: Sequence[int]) -> float:
    highest = max(scores)
    return (scores[_right(question)] == highest) / scores.count(highest)


def _sign_of_length(train: Sequence[Question]) -> int:
    longest = shortest = 0.0
    for question in train:
        lengths = [len(option) for option in question.options]
        longest += _credit(question, lengths)
        shortest += _credit(question, [-length for length in lengths])
    return 1 if longest >= shortest else -1  # 1 without training questions


def main() -> int:
    return run_program("blind", _print_baselines)


def _print_baselines() -> None:
    parser = argparse.ArgumentParser("blind", description=__doc__.partition("\n")[0])
    for flag, purpose in (("--train", "fit on"), ("--test", "answer")):
        parser.add_argument(
            flag, type=Path, nargs="+", required=True, help=f"question files to {purpose}"
        )
    given = parser.parse_args()
    train = _read(given.train)
    test = _read(given.test)
    print(json.dumps(by_modality(test, blind_credits(train, test)), indent=2))


def _read(files: Sequence[Path]) -> list[Question]:
    questions: list[Question] = []
    for file in files:
        questions += read_questions(file, check_images=False)  # the images are not used
    return questions


if __name__ == "__main__":
    sys.exit(main())
