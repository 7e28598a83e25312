"""Which questions a step trains on: a pure function of (seed, step), so that a resume has nothing
to restore.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from common.errors import InputError

from .encode import Prompt, PromptEncoder
from .question import Question

_DECODERS = 4  # threads; Pillow and NumPy release the interpreter while they work


@lru_cache(maxsize=4)
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

    Raises:
        InputError: there are no questions.
    """
    if not questions:
        raise InputError(
            "there are no questions to train on: check the question file and the subset that is chosen"
        )
    total = len(questions)
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    return [
        questions[permutation(total, f"epoch {seed} {at // total}")[at % total]] for at in places
    ]


def prompts_of_steps(
    encoder: PromptEncoder,
    questions: Sequence[Question],
    steps: range,
    prompts_per_step: int,
    seed: int,
    unreadable: Callable[[InputError], None] | None = None,
) -> Iterator[list[Prompt]]:
    """The prompts of each of the `steps` in turn; threads decode the next step's images while a
    step is worked on.

    Tokenising stays in the caller's thread: it takes no time, and tokenizers are not made for
    sharing. A question whose image can't be used is left out of its step if `unreadable` takes the
    error.

    Raises:
        InputError: when its step comes, an image can't be used and `unreadable` is None, or a
            prompt is too long.
    """
    pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="images")

    def begin(step: int) -> list[tuple[Question, Future]]:
        asked = questions_of_step(questions, step, prompts_per_step, seed) if step in steps else []
        return [(question, pool.submit(encoder.patchify, question)) for question in asked]

    try:
        coming = begin(steps.start)
        for step in steps:
            now, coming = coming, begin(step + 1)
            prompts = []
            for question, images in now:
                try:
                    prompts.append(encoder.assemble(question, images.result()))
                except InputError as error:
                    if unreadable is None:
                        raise
                    unreadable(error)
            yield prompts
    finally:
        pool.shutdown(
            cancel_futures=True
        )  # whoever stops does not wait for images that nobody will see
