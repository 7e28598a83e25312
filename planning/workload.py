"""The workload of a run, from its questions and the headers of its images."""

from collections.abc import Iterable
from contextlib import suppress

from common.config import Config
from common.errors import InputError
from data import PromptEncoder, Question, Vocabulary
from data.choice import load_questions, refuse_overlap
from grpo.rollout import micro_batch_slices
from training.prepare import fitting_questions
from training.sft import target


class Workload:
    """The questions of a run, read and checked as in the run itself, but without pixels.

    Every prompt is assumed to be as long as the longest, and every completion to reach the length
    limit.

    Attributes:
        questions: by use: "train", "validate", "test".
        left_out: number of questions skipped because their prompts are too long.
        prompts: number of tokens in each question's prompt.
        trained, tested: the questions with the longest prompts in the training data, and in the
            data on which accuracy is measured (None without such data).
        micro_batch, test_batch: number of questions in a micro-batch, and in a batch when accuracy
            is measured.
        group_size, completion: completions per question in training, and their length in tokens.

    Raises:
        InputError: the run would refuse this input.
    """

    def __init__(self, config: Config, encoder: PromptEncoder, vocabulary: Vocabulary) -> None:
        questions = load_questions(config)
        refuse_overlap(questions)
        (train, validation, test), too_long, _ = fitting_questions(encoder, config, questions)
        self.left_out = sum(too_long)
        self.questions = {"train": train, "validate": validation, "test": test}
        self.prompts: dict[Question, int] = {}
        for question in (*train, *validation, *test):
            with suppress(InputError):  # an unreadable image that will be skipped
                self.prompts[question] = encoder.count_tokens(question)

        self.group_size, self.completion = config.group_size, config.max_new_tokens
        if config.method == "sft":
            answers = [vocabulary.encode(target(one, config.sft_answer)) for one in train]
            self.group_size, self.completion = 1, max(map(len, answers)) + 1  # + 1: the end of turn
        self.trained = self._longest(train)
        lengths = [self.prompts[self.trained]] * config.prompts_per_step
        completions = [self.completion] * config.prompts_per_step
        tokens_each = config.micro_batch_tokens
        slices = micro_batch_slices(lengths, completions, self.group_size, tokens_each)
        self.micro_batch = slices[0].stop
        measured = max(validation, test, key=len)
        self.tested = self._longest(measured) if measured else None
        self.test_batch = min(config.eval_batch_prompts, len(measured))

    def _longest(self, questions: Iterable[Question]) -> Question:
        readable = (question for question in questions if question in self.prompts)
        return max(readable, key=self.prompts.__getitem__)
