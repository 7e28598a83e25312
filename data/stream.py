"""Which questions a step trains on: a pure function of (seed, step), so that a resume has nothing
to restore.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from common.errors import InputError

from .encode import LoadImage, Patches, Prompt, PromptEncoder
from .images import load_image
from .question import Question

_DECODERS = 4  # threads; Pillow and NumPy release the interpreter while they work


@lru_cache(maxsize=4)  # a step's questions need one or two; sorting all anew takes longer
def permutation(length: int, seed: str) -> tuple[int, ...]:
    """A permutation of range(length), the same on every machine.

    It sorts by draws of `random.random`, whose sequence for a seed Python guarantees between
    versions; `shuffle`, NumPy and torch give no such promise.
    """
    draw = random.Random(seed)
    keys = [draw.random() for _ in range(length)]
    return tuple(sorted(range(length), key=keys.__getitem__))


def questions_of_step(
    questions: Sequence[Question], step: int, prompts_per_step: int, seed: int
) -> list[Question]:
    """The `prompts_per_step` questions of a step (counted from 0).

    Every epoch is a permutation of all questions, drawn from (seed, epoch); steps walk through the
    epochs one after the other. A step may begin in one epoch and end in the next: no question is
    dropped, and none is shown twice within an epoch.
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
) -> Iterator[list[Prompt]]:
    """The prompts of each of the `steps` in turn; threads decode the next step's images while a
    step is worked on.

    A question whose image can't be used is left out of its step if `unreadable` takes the error;
    `load` reads an image file.

    Raises:
        InputError: an image of the step can't be used and `unreadable` is None.
    """
    pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="images")
    chosen = (questions_of_step(questions, step, prompts_per_step, seed) for step in steps)
    begun = (_begin(pool, encoder, batch, load) for batch in chosen)  # each when it is asked for
    try:
        coming = next(begun, None)
        while coming is not None:
            now, coming = coming, next(begun, None)
            prompts = []
            for question, images in now:
                try:
                    # Here and not in the pool: tokenizers are not made for several threads.
                    prompts.append(encoder.assemble(question, images.result()))
                except InputError as error:
                    if unreadable is None:
                        remedy = "or go on without such images, by --bad_images skip"
                        raise InputError(f"{error}; {remedy}") from None
                    unreadable(error)
            yield prompts
    finally:
        pool.shutdown(cancel_futures=True)  # who stops does not wait for images that nobody needs


def _begin(
    pool: ThreadPoolExecutor, encoder: PromptEncoder, questions: list[Question], load: LoadImage
) -> list[tuple[Question, Future[Patches]]]:
    return [(question, pool.submit(encoder.patchify, question, load)) for question in questions]
