"""Choosing some of a file's questions, and splitting them into train and test."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError

from .question import Question, canonical_modality
from .stream import permutation


def choose_questions(
    questions: Sequence[Question],
    modality: str | None = None,
    count: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """`count` questions of one modality, drawn with a seed, in the order in which they were given.

    None means all modalities, or all questions. With one seed a smaller choice is part of every
    larger one.

    Raises:
        InputError: there are fewer than `count` such questions, or none at all.
    """
    wanted = None if modality is None else canonical_modality(modality)
    found = [question for question in questions if wanted in (None, question.modality)]
    if count is not None and count < 1:
        raise InputError(
            f"{count} questions asked for: give a positive number, or leave it out to take all"
        )
    if not found and questions and wanted:
        known = ", ".join(sorted({question.modality for question in questions}))
        raise InputError(
            f"no question of modality {wanted!r} (there are {known}): correct the name or the file"
        )
    if len(found) < (count or 1):
        by_modality = Counter(question.modality for question in questions)
        available = (
            ", ".join(f"{name} {number}" for name, number in sorted(by_modality.items()))
            or "no questions"
        )
        raise InputError(
            f"{count or 'some'} questions{f' of modality {wanted}' if wanted else ''} asked for, but there are only "
            f"{len(found)} (available: {available}): ask for fewer or give another question file"
        )
    chosen = permutation(len(found), f"subset {seed}")[:count]
    return [found[index] for index in sorted(chosen)]


def split_by_image(
    questions: Sequence[Question], test_fraction: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Train and test questions that share no image, each in the order in which they were given.

    Questions that share an image, directly or through a chain of questions with several images,
    stay together. Such clusters are taken for the test set in an order drawn with the seed, as long
    as they fit into `test_fraction` of all questions; so the test set may be a little smaller than
    asked for, never larger.

    Raises:
        InputError: one of the two sets would be empty, or `test_fraction` is not between 0 and 1.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"test fraction {test_fraction}: give a number between 0 and 1")
    clusters = _clusters(questions)
    room = round(test_fraction * len(questions))
    in_test: set[int] = set()
    for index in permutation(len(clusters), f"split {seed}"):
        if len(clusters[index]) <= room - len(in_test):
            in_test.update(clusters[index])
    if not 0 < len(in_test) < len(questions):
        raise InputError(
            f"{len(questions)} questions on {len(clusters)} unconnected groups of images can't be split with test "
            f"fraction {test_fraction}: choose another fraction or give more images"
        )
    train = [question for index, question in enumerate(questions) if index not in in_test]
    test = [question for index, question in enumerate(questions) if index in in_test]
    return train, test


def _clusters(questions: Sequence[Question]) -> list[list[int]]:
    """Indices of the questions, grouped by images that they share (union-find with path
    halving).
    """
    parent = list(range(len(questions)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[Path, int] = {}
    for index, question in enumerate(questions):
        for image in question.images:
            parent[root(index)] = root(first_with.setdefault(image, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(questions)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
