"""The questions of each step: a pure function of (seed, step), with no state to restore."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from common.errors import InputError

from .encode import LoadImage, Patches, Prompt, PromptEncoder
from .images import load_image
from .question import Question

_DECODERS = 4  # threads; Pillow and NumPy release the interpreter lock while they work


@lru_cache(maxsize=4)  # a step needs one or two; sorting again at every step would take longer
def permutation(length: int, seed: str) -> tuple[int, ...]:
    """A permutation of range(length), the same on every machine.

    It sorts by draws from `random.random`, whose sequence for a given seed Python guarantees across
    versions. `shuffle`, NumPy and torch make no such promise.
    """
    draw = random.Random(seed)
    keys = [draw.random() for _ in range(length)]
    return tuple(sorted(range(length), key=keys.__getitem__))


def questions_of_step(
    questions: Sequence[Question], step: int, prompts_per_step: int, seed: int
) -> list[Question]:
    """The `prompts_per_step` questions of a step (counted from 0).

    Every epoch is a permutation of all questions, drawn from (seed, epoch), and the steps run
    through the epochs in order. A step may begin in one epoch and end in the next: no question is
    dropped, and none occurs twice within an epoch.
    """
    total = len(questions)
    chosen = []
    for place in range(step * prompts_per_step, (step + 1) * prompts_per_step):
        epoch, within = divmod(place, total)
        order = permutation(total, f"epoch {seed} {epoch}")
        chosen.append(questions[order[within]])
    return chosen


def prompts_of_steps(
    encoder: PromptEncoder,
    questions: Sequence[Question],
    steps: range,
    prompts_per_step: int,
    seed: int,
    unreadable: Callable[[InputError], None] | None = None,
    load: LoadImage = load_image,
    share: Callable[[int], slice] = lambda count: slice(0, count),
) -> Iterator[dict[int, Prompt]]:
    """Yield the prompts of each step in turn, by their places in the step, while threads decode the
    images of the next step.

    Args:
        unreadable: called with the error if a question has an image that can't be used; the
            question is left out of its step.
        load: reads an image file.
        share: which of a step's questions, given their number, this process encodes.

    Raises:
        InputError: an image of the step can't be used and `unreadable` is None.
    """
    pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="images")
    chosen = (questions_of_step(questions, step, prompts_per_step, seed) for step in steps)
    pending = (
        _start_decoding(pool, encoder, batch, load, share(len(batch))) for batch in chosen
    )  # lazy
    try:
        following = next(pending, None)
        while following is not None:
            current, following = following, next(pending, None)
            prompts = {}
            for place, (question, images) in current.items():
                try:
                    # Here and not in the pool: tokenizers are not thread-safe.
                    prompts[place] = encoder.assemble(question, images.result())
                except InputError as error:
                    if unreadable is None:
                        remedy = "or continue without such images (--bad_images skip)"
                        raise InputError(f"{error}; {remedy}") from None
                    unreadable(error)
            yield prompts
    finally:
        pool.shutdown(cancel_futures=True)  # on a stop, don't decode images that nobody needs


def _start_decoding(
    pool: ThreadPoolExecutor,
    encoder: PromptEncoder,
    questions: list[Question],
    load: LoadImage,
    share: slice,
) -> dict[int, tuple[Question, Future[Patches]]]:
    """The questions of the share, by their places in the step, and their images to come."""
    started = {}
    for place in range(share.start, share.stop):
        question = questions[place]
        started[place] = question, pool.submit(encoder.patchify, question, load)
    return started
