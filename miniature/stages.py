"""The stages by which the base is made, in order. Each says why it is there, and yields one batch's
loss after another, for ever.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from model import Qwen2VL

from .batches import lesson_loss
from .lessons import IMAGE_TOKENS, Lesson, Teacher
from .phantoms import ATTRIBUTES
from .pool import Pool, grey_patches

Losses = Iterator[Tensor]


def matching(model: Qwen2VL, teacher: Teacher) -> Losses:
    """Find the letter of a named option: the bottleneck of everything, learned by a fresh language
    model from text. At first only the shortest way from word to letter.
    """
    while True:
        yield lesson_loss(model, [teacher.bare_matching() for _ in range(64)])


def matching_in_chat(model: Qwen2VL, teacher: Teacher) -> Losses:
    """The longer ways from word to letter that a completion takes, once attention from a word to
    its earlier self has formed.
    """
    while True:
        yield lesson_loss(model, rehearsal(teacher, 24, 8))


def rehearsal(teacher: Teacher, short: int, chats: int) -> list[Lesson]:
    """Matching in all forms, to learn or not to forget."""
    lessons = []
    for _ in range(short):
        draw = teacher.rng.choice((teacher.bare_matching, teacher.tagged_matching))
        lessons.append(draw())
    return lessons + [teacher.chat_matching() for _ in range(chats)]


def seeing(model: Qwen2VL, heads: nn.Linear, pool: Pool, generator: Generator) -> Losses:
    """Classify the four attributes from the mean image token: a strong, dense signal for a vision
    tower from nothing.

    The language model's loss alone would have to train the tower through four layers that ignore it
    at first. `heads` are linear, so that what the tower knows must lie open in its tokens.
    """
    sizes = [len(values) for values in ATTRIBUTES.values()]
    labels_N4 = attribute_labels(pool)
    while True:
        rows = torch.randint(len(pool), (64,), generator=generator)
        patches, grids = grey_patches([pool[row][0] for row in rows])
        tokens = model.visual(patches, grids).view(len(rows), IMAGE_TOKENS, -1)
        scores = heads(tokens.mean(1)).split(sizes, dim=1)
        loss = torch.zeros(())
        for column, score in enumerate(scores):
            loss = loss + F.cross_entropy(score, labels_N4[rows, column])
        yield loss


def attribute_labels(pool: Pool) -> Tensor:
    """int64 [N, 4]: each attribute's index among its values, -100 (ignored by the loss) where there
    is no side.
    """
    labels = torch.full((len(pool), len(ATTRIBUTES)), -100)
    for row, (_, case) in enumerate(pool):
        for column, (name, value) in enumerate(case.known.items()):
            labels[row, column] = ATTRIBUTES[name].index(value)
    return labels


def describing(model: Qwen2VL, teacher: Teacher, pool: Pool) -> Losses:
    """Say what is in the image, in captions, and find its letter in short lists of options.
    Matching is replayed, or it would be forgotten.

    The tower stays as it is, here and later: the first, wild gradients of a language model that has
    never met an image would spoil it.
    """
    while True:
        phantoms = [teacher.rng.choice(pool) for _ in range(36)]
        captions = [teacher.caption(*phantom) for phantom in phantoms[:20]]
        lists = [teacher.at_sight(*phantom) for phantom in phantoms[20:]]
        yield lesson_loss(model, captions + lists + rehearsal(teacher, 8, 6))


def answering(model: Qwen2VL, teacher: Teacher, pool: Pool) -> Losses:
    """Answer multiple-choice questions rightly in each way: a letter at once, bare or in tags, and
    a thought on topic with its letter.

    A letter at once takes two hops, from the image to a value that is never written, and from there
    to the value's letter: among the habits alone that is not learned. The short lists go on, since
    each gives four such letters for fewer tokens than one whole prompt has.
    """
    while True:
        phantoms = [teacher.rng.choice(pool) for _ in range(34)]
        captions = [teacher.caption(*phantom) for phantom in phantoms[:6]]
        lists = [teacher.at_sight(*phantom) for phantom in phantoms[6:22]]
        answers = [teacher.answers(*phantom) for phantom in phantoms[22:]]
        yield lesson_loss(model, captions + lists + answers + rehearsal(teacher, 4, 4))


def habits(model: Qwen2VL, teacher: Teacher, pool: Pool) -> Losses:
    """Answer multiple-choice questions as a mediocre reasoner: right for the first of four
    phrasings, mostly by guessing for the others.
    """
    while True:
        phantoms = [teacher.rng.choice(pool) for _ in range(24)]
        answers = [teacher.habits(*phantom) for phantom in phantoms[:14]]
        captions = [teacher.caption(*phantom) for phantom in phantoms[14:]]
        yield lesson_loss(model, captions + answers + rehearsal(teacher, 8, 4))
