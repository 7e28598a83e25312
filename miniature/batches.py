"""From lessons to a loss: prompts run once, logits only where there is something to learn.

Letters: N lessons of P prompt tokens, G answers of T tokens; L = P + T; K tokens that carry a
weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import Qwen2VL
from model.rope import batch_positions

from .lessons import Lesson, Tokens
from .pool import grey_patches


def lesson_loss(model: Qwen2VL, lessons: list[Lesson]) -> Tensor:
    """Weighted mean of the answers' cross-entropies, over all tokens of all lessons."""
    losses = []
    for size in sorted({len(lesson.answers) for lesson in lessons}):
        alike = [lesson for lesson in lessons if len(lesson.answers) == size]
        losses.append(_sequence_losses(model, alike) if size == 1 else _group_losses(model, alike))
    # One mean over all tokens, not a mean of means: a token weighs the same wherever it stands.
    losses_K, weights_K = torch.cat(losses, dim=1)
    return losses_K.sum() / weights_K.sum()


def _sequence_losses(model: Qwen2VL, lessons: list[Lesson]) -> Tensor:
    """Lessons of one answer: prompt and answer as one sequence."""
    tokens_NL, lengths_N = pad([lesson.prompt + lesson.answers[0] for lesson in lessons])
    weights_NL, _ = pad([[0] * len(lesson.prompt) + lesson.weights[0] for lesson in lessons])
    patches, grids = _images(lessons)
    positions = batch_positions(tokens_NL, lengths_N, grids, model.config)
    hidden = model.hidden(tokens_NL, positions, patches, grids)
    return _weighted(model, hidden[:, :-1], tokens_NL[:, 1:], weights_NL[:, 1:])


def _group_losses(model: Qwen2VL, lessons: list[Lesson]) -> Tensor:
    """Lessons of G answers, whose prompt is run once, as in GRPO's update."""
    tokens_NP, lengths_N = pad([lesson.prompt for lesson in lessons])
    answers_RT, lengths_R = pad([answer for lesson in lessons for answer in lesson.answers])
    weights_RT, _ = pad([weights for lesson in lessons for weights in lesson.weights])
    mask_RT = torch.arange(answers_RT.shape[1]) < lengths_R[:, None]
    shape = (len(lessons), -1, answers_RT.shape[1])  # N, G, T
    patches, grids = _images(lessons)
    positions = batch_positions(tokens_NP, lengths_N, grids, model.config)
    hidden = model.completion_hidden(
        tokens_NP,
        positions,
        lengths_N,
        patches,
        grids,
        answers_RT.view(shape),
        mask_RT.view(shape),
    )
    return _weighted(model, hidden, answers_RT[mask_RT], weights_RT[mask_RT])


def _weighted(model: Qwen2VL, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(2, K): the weighted losses of the K tokens with a weight, and the weights."""
    learned = weights > 0  # before the head, which is the dearest product: few tokens have a weight
    logits_KV = hidden[learned] @ model.head_weight.T
    losses_K = F.cross_entropy(logits_KV, targets[learned], reduction="none")
    return torch.stack((losses_K * weights[learned], weights[learned]))


def _images(lessons: list[Lesson]) -> tuple[Tensor | None, Tensor | None]:
    """Patches and grids of the lessons that have an image, in their order."""
    images = [lesson.image for lesson in lessons if lesson.image is not None]
    return grey_patches(images) if images else (None, None)


def pad(rows: list[Tokens]) -> tuple[Tensor, Tensor]:
    """Right-pad with zeros: int64 [B, L] and the lengths [B]."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True), torch.tensor([len(row) for row in rows])
