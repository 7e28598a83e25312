"""Choosing some of a file's questions, and splitting them into train and test."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError

from .question import Question, canonical_modality
from .stream import permutation


def choose_questions(
    questions: Sequence[Question],
    modality: str = "",
    count: int = 0,
    seed: int = 0,
) -> list[Question]:
    """`count` questions of one modality, drawn with a seed, in the order in which they were given.

    "" means all modalities, 0 all questions. With one seed a smaller choice is part of every larger
    one.

    Raises:
        InputError: there are fewer than `count` such questions, or none at all.
    """
    wanted = canonical_modality(modality) if modality else ""
    matching = [question for question in questions if wanted in ("", question.modality)]
    if len(matching) < max(count, 1):
        counts = Counter(question.modality for question in questions)
        available = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
        raise InputError(
            f"only {len(matching)} questions of {wanted or 'any modality'} for a count of "
            f"{count or 'all'} (available: {available or 'none'}): ask for fewer, correct the "
            "modality, or give another question file"
        )
    # The beginning of one permutation, so that a larger count keeps what a smaller one has.
    drawn = permutation(len(matching), f"subset {seed}")[: count or None]
    return [matching[index] for index in sorted(drawn)]


def split_by_image(
    questions: Sequence[Question], test_fraction: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Train and test questions that share no image, each in the order in which they were given.

    Questions that share an image, directly or through a chain of questions with several images,
    stay together. Such clusters are taken for the test set in an order drawn with the seed, as long
    as they fit into `test_fraction` of all questions; so the test set may be a little smaller than
    asked for, never larger.

    Raises:
        InputError: one of the two sets would be empty.
    """
    clusters = _clusters(questions)
    room = round(test_fraction * len(questions))
    in_test: set[int] = set()
    for index in permutation(len(clusters), f"split {seed}"):
        # One that does not fit is passed over: a smaller one behind it may.
        if len(in_test) + len(clusters[index]) <= room:
            in_test.update(clusters[index])
    train = [question for index, question in enumerate(questions) if index not in in_test]
    test = [questions[index] for index in sorted(in_test)]
    if not train or not test:
        raise InputError(
            f"{len(questions)} questions on {len(clusters)} unconnected groups of images can't be "
            f"split with test fraction {test_fraction}: choose another fraction or give more images"
        )
    return train, test


def _clusters(questions: Sequence[Question]) -> list[list[int]]:
    """Indices of the questions, grouped by images that they share, the first question's group
    first.
    """
    # A union-find forest: questions that share an image have the same root.
    parents = list(range(len(questions)))
    first_with: dict[Path, int] = {}
    for index, question in enumerate(questions):
        for image in question.images:
            first = first_with.setdefault(image, index)
            parents[_root(parents, first)] = _root(parents, index)
    clusters: dict[int, list[int]] = {}
    for index in range(len(questions)):
        clusters.setdefault(_root(parents, index), []).append(index)
    return list(clusters.values())


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]  # halves the way of whoever comes next
        index = parents[index]
    return index
