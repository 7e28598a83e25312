"""The stages by which the base is made, in order. Each says why it is there."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Qwen2VL

from .batches import lesson_loss
from .lessons import IMAGE_TOKENS, Example, Group, Teacher
from .phantoms import ATTRIBUTES
from .pool import Pool, grey_patches
from .training import fit


def learn_matching(model: Qwen2VL, teacher: Teacher) -> None:
    """Find the letter of a named option: the bottleneck of everything, learned by a fresh language
    model from text.

    At first only the shortest way from word to letter; when attention from a word to its earlier
    self has formed, the longer ways that a completion takes.
    """
    language = language_parameters(model)
    bare = lambda step: lesson_loss(model, [teacher.bare_matching() for _ in range(64)])  # noqa: E731
    fit("matching", language, bare, steps=900, rate=1e-3)
    fit(
        "in chat",
        language,
        lambda step: lesson_loss(model, *rehearsal(teacher, 24, 8)),
        steps=500,
        rate=1e-3,
    )


def rehearsal(teacher: Teacher, short: int, chats: int) -> tuple[list[Example], list[Group]]:
    """Matching in all forms, to learn or not to forget."""
    examples = [
        teacher.rng.choice((teacher.bare_matching, teacher.tagged_matching))() for _ in range(short)
    ]
    return examples, [teacher.chat_matching() for _ in range(chats)]


def learn_seeing(model: Qwen2VL, pool: Pool, seed: int) -> nn.Linear:
    """Classify the four attributes from the mean image token: a strong, dense signal for a vision
    tower from nothing.

    The language model's loss alone would have to train the tower through four layers that ignore it
    at first. Returns the classifier, which is thrown away.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = attribute_labels(pool)
    heads = nn.Linear(model.config.hidden_size, sum(map(len, ATTRIBUTES.values())))
    nn.init.normal_(heads.weight, 0, model.config.hidden_size**-0.5, generator=generator)
    nn.init.zeros_(heads.bias)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pool), (64,), generator=generator)
        scores = classify(model, heads, pool, rows)
        return sum(
            F.cross_entropy(score, labels[rows, column]) for column, score in enumerate(scores)
        )

    fit("seeing", [*model.visual.parameters(), *heads.parameters()], loss, steps=2000, rate=1e-3)
    return heads


def learn_describing(model: Qwen2VL, teacher: Teacher, pool: Pool) -> None:
    """Say what is seen: captions, then answers to open questions. Matching is replayed, or it would
    be forgotten.

    The tower stays as it is, here and later: the first, wild gradients of a language model that has
    never seen an image would spoil it.
    """

    def loss(step: int) -> Tensor:
        chosen = [teacher.rng.randrange(len(pool)) for _ in range(40)]
        seen = [teacher.caption(pool.cases[i], i) for i in chosen[:28]]
        asked = [teacher.open_question(pool.cases[i], i) for i in chosen[28:]]
        matched, chats = rehearsal(teacher, 12, 8)
        return lesson_loss(model, seen + asked + matched, chats, pool)

    fit("describing", language_parameters(model), loss, steps=900, rate=1e-3)


def learn_habits(model: Qwen2VL, teacher: Teacher, pool: Pool) -> None:
    """Answer multiple-choice questions as a mediocre reasoner: at times on topic and right, mostly
    at random.
    """

    def loss(step: int) -> Tensor:
        chosen = [teacher.rng.randrange(len(pool)) for _ in range(24)]
        habits = [teacher.habits(pool.cases[i], i) for i in chosen[:14]]
        seen = [teacher.caption(pool.cases[i], i) for i in chosen[14:]]
        matched, chats = rehearsal(teacher, 8, 4)
        return lesson_loss(model, seen + matched, habits + chats, pool)

    fit("habits", language_parameters(model), loss, steps=700, rate=7e-4)


def language_parameters(model: Qwen2VL) -> list[nn.Parameter]:
    """All but the vision tower's, which is told that it needs no gradient."""
    model.visual.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def attribute_labels(pool: Pool) -> Tensor:
    """int64 [N, 4]: each attribute's index among its values, -100 (ignored by the loss) where there
    is no side.
    """
    index = {
        name: {value: at for at, value in enumerate(values)} for name, values in ATTRIBUTES.items()
    }
    return torch.tensor(
        [[index[name].get(case.value(name), -100) for name in ATTRIBUTES] for case in pool.cases]
    )


def classify(model: Qwen2VL, heads: nn.Linear, pool: Pool, rows: Tensor) -> tuple[Tensor, ...]:
    """Scores [B, values] of each attribute for the pool's images at `rows`."""
    patches, grids = grey_patches(pool.images(rows.tolist()))
    tokens = model.visual(patches, grids).view(len(rows), IMAGE_TOKENS, -1)
    return heads(tokens.mean(1)).split([len(values) for values in ATTRIBUTES.values()], dim=1)
