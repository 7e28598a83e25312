"""From examples and groups to a loss: prompts run once, logits only where there is something to
learn.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Qwen2VL
from model.rope import batch_positions

from .lessons import Example, Group
from .pool import MERGE, Pool, grey_patches


def lesson_loss(
    model: Qwen2VL,
    examples: Sequence[Example],
    groups: Sequence[Group] = (),
    pool: Pool | None = None,
) -> Tensor:
    """Weighted mean of the tokens' cross-entropies; `pool` holds the images that examples and
    groups name.
    """
    parts = [_example_losses(model, examples, pool)] if examples else []
    for size in sorted({len(group.answers) for group in groups}):
        parts.append(
            _group_losses(model, [group for group in groups if len(group.answers) == size], pool)
        )
    losses, weights = torch.cat(parts, dim=1)
    return losses.sum() / weights.sum()


def _example_losses(model: Qwen2VL, examples: Sequence[Example], pool: Pool | None) -> Tensor:
    tokens, lengths = pad([example.tokens for example in examples])
    weights = pad([example.weights for example in examples])[0][:, 1:]
    patches, grids = _images(examples, pool)
    positions = batch_positions(tokens, lengths, grids, model.config.image_token_id, MERGE)
    hidden = model.hidden(tokens, positions, patches, grids)[:, :-1]
    return _weighted(model, hidden, tokens[:, 1:], weights)


def _group_losses(model: Qwen2VL, groups: Sequence[Group], pool: Pool | None) -> Tensor:
    tokens, lengths = pad([group.prompt for group in groups])
    shape = (len(groups), len(groups[0].answers), -1)
    answers, answer_lengths = pad([answer for group in groups for answer in group.answers])
    answers, mask = (
        answers.view(shape),
        (torch.arange(answers.shape[1]) < answer_lengths[:, None]).view(shape),
    )
    weights = pad([row for group in groups for row in group.weights])[0].view(shape)
    patches, grids = _images(groups, pool)
    positions = batch_positions(tokens, lengths, grids, model.config.image_token_id, MERGE)
    hidden = model.completion_hidden(tokens, positions, lengths, patches, grids, answers, mask)
    return _weighted(model, hidden, answers[mask], weights[mask])


def _weighted(model: Qwen2VL, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(2, K): the weighted losses of the K tokens with a weight, and the weights."""
    learned = weights > 0
    losses = F.cross_entropy(
        hidden[learned] @ model.head_weight.T, targets[learned], reduction="none"
    )
    return torch.stack((losses * weights[learned], weights[learned]))


def _images(
    lessons: Sequence[Example | Group], pool: Pool | None
) -> tuple[Tensor | None, Tensor | None]:
    images = [lesson.image for lesson in lessons if lesson.image is not None]
    return grey_patches(pool.images(images)) if images else (None, None)


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad with zeros: int64 [B, L] and the lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, values in zip(padded, rows):
        row[: len(values)] = torch.tensor(values)
    return padded, lengths
