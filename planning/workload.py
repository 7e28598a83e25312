"""What a run works on, from its questions and its images' headers alone: sizes of prompts, steps,
the heaviest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.config import Config
from common.errors import InputError
from data import PromptEncoder, Question, Vocabulary, questions_of_step
from data.choice import load_questions, refuse_overlap
from grpo.rollout import micro_batch_slices
from training.sft import target


@dataclass(frozen=True)
class Load:
    """The most that a run works on at once: questions of a batch of tests, of a step, of a
    micro-batch.

    `accumulates` says whether a step has more than one micro-batch; `group_size` and `completion`
    are the number and length of a question's completions in training.
    """

    tested: Sequence[Question]
    step: Sequence[Question]
    micro_batch: Sequence[Question]
    accumulates: bool
    group_size: int
    completion: int


@dataclass(frozen=True)
class Workload:
    """The questions of a run, in the order of `load_questions`, and its steps.

    `sizes` are the tokens of each question's prompt; `parts` the numbers of micro-batches that
    steps have; `passes` says how many of the heaviest micro-batch all steps together amount to, by
    their tokens.
    """

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    left_out: int
    sizes: dict[Question, int]
    parts: list[int]
    passes: float
    heaviest: Load


def read_workload(config: Config, encoder: PromptEncoder, vocabulary: Vocabulary) -> Workload:
    """Read and check all questions as the run does, but no pixel. InputError for whatever the run
    would refuse.
    """
    unreadable: list[InputError] = []
    forgive = unreadable.append if config.bad_images == "skip" else None
    train, validation, test = load_questions(config)
    refuse_overlap(train, validation, test)
    train, left_out = encoder.select(train, forgive)
    (validation, more), (test, most) = encoder.select(validation), encoder.select(test)
    sizes = {}
    for question in (*train, *validation, *test):
        try:
            sizes[question] = encoder.count_tokens(question)
        except InputError:
            pass  # `select` has found that the run forgives it
    train = [question for question in train if question in sizes]
    answers = {question: _completion(config, vocabulary, question) for question in train}
    parts, passes, heaviest = _steps(
        config, train, sizes, answers, max((validation, test), key=len)
    )
    return Workload(train, validation, test, left_out + more + most, sizes, parts, passes, heaviest)


def _completion(config: Config, vocabulary: Vocabulary, question: Question) -> int:
    """Most tokens of a completion, end of turn included."""
    if config.method == "grpo":
        return config.max_new_tokens
    return len(vocabulary.encode(target(question, config.sft_answer))) + 1


def _steps(
    config: Config,
    train: list[Question],
    sizes: dict[Question, int],
    answers: dict[Question, int],
    tested: list[Question],
) -> tuple[list[int], float, Load]:
    """How many micro-batches each step has; see `Workload.passes`; the heaviest of all."""
    group_size = config.group_size if config.method == "grpo" else 1

    def tokens(questions: Sequence[Question]) -> int:
        prompt, answer = (
            max(found[question] for question in questions) for found in (sizes, answers)
        )
        return len(questions) * (prompt + group_size * answer)

    steps = [
        questions_of_step(train, step, config.prompts_per_step, config.seed)
        for step in range(config.steps)
    ]
    parts, micro_batches = [], []
    for step in steps:
        found = ([sizes[question] for question in step], [answers[question] for question in step])
        slices = micro_batch_slices(*found, group_size, config.micro_batch_tokens)
        parts.append(len(slices))
        micro_batches += [step[part] for part in slices]
    heaviest = max(micro_batches, key=tokens)
    passes = sum(map(tokens, micro_batches)) / tokens(heaviest)
    return parts, passes, Load(
        tested=_heaviest_batch(tested, sizes, config.eval_batch_prompts),
        step=max(steps, key=tokens),
        micro_batch=heaviest,
        accumulates=max(parts) > 1,
        group_size=group_size,
        completion=max(answers[question] for question in heaviest),
    )  # fmt: skip


def _heaviest_batch(
    questions: list[Question], sizes: dict[Question, int], size: int
) -> list[Question]:
    """Of those that `evaluation.answers` makes: like lengths together."""
    order = sorted(questions, key=sizes.__getitem__)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return max(batches, key=lambda batch: len(batch) * sizes[batch[-1]], default=[])
