"""Choose a subset of questions, and split questions into training and test sets."""

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
    """Draw `count` questions of one modality with a seed, and return them in their original order.

    A modality of "" means all modalities, a count of 0 all questions. With the same seed, a smaller
    subset is contained in every larger one.

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
            f"{count or 'all'} (available: {available or 'none'}): lower the count, correct the "
            "modality, or give another question file"
        )
    # The start of one permutation: a larger count keeps the questions of a smaller one.
    drawn = permutation(len(matching), f"subset {seed}")[: count or None]
    return [matching[index] for index in sorted(drawn)]


def split_by_image(
    questions: Sequence[Question], test_fraction: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Split questions into training and test sets without common images, in their original order.

    Questions that share an image, directly or through a chain of questions with several images,
    form a cluster and stay together. Clusters go to the test set in an order drawn with the seed,
    as long as they fit into `test_fraction` of all questions. So the test set may be slightly
    smaller than requested, but never larger.

    Raises:
        InputError: one of the two sets would be empty.
    """
    clusters = _clusters(questions)
    room = round(test_fraction * len(questions))
    in_test: set[int] = set()
    for index in permutation(len(clusters), f"split {seed}"):
        # Skip a cluster that does not fit: a later, smaller one may.
        if len(in_test) + len(clusters[index]) <= room:
            in_test.update(clusters[index])
    train = [question for index, question in enumerate(questions) if index not in in_test]
    test = [questions[index] for index in sorted(in_test)]
    if not train or not test:
        raise InputError(
            f"{len(questions)} questions on {len(clusters)} unconnected sets of images can't be "
            f"split with test fraction {test_fraction}: choose another fraction or give more images"
        )
    return train, test


def _clusters(questions: Sequence[Question]) -> list[list[int]]:
    """The indices of the questions, clustered by shared images, in order of first question."""
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
        parents[index] = parents[parents[index]]  # path halving: later look-ups are shorter
        index = parents[index]
    return index
