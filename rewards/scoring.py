"""All rules, in the order of their weights in train.py. Another reward is another entry here, and
its weight there.
"""

from collections.abc import Callable, Sequence

from .rules import Verdict, judge_accuracy, judge_format

RULES: dict[str, Callable[[str, str, Sequence[str]], Verdict]] = {
    "format": lambda completion, answer, options: judge_format(completion),
    "accuracy": lambda completion, answer, options: judge_accuracy(completion, answer),
}
"""Name -> rule(completion, right letter, texts of the options)."""


def score(completion: str, answer: str, options: Sequence[str] = ()) -> tuple[Verdict, ...]:
    """The verdict of every rule, in the order of `RULES`. Raises ValueError if `answer` is not a
    letter A-J.
    """
    return tuple(rule(completion, answer, options) for rule in RULES.values())
