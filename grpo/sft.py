"""Supervised fine-tuning on the right letters (SFT): the baseline that GRPO is compared with.

Same questions in the same order, same prompts and pixels, same optimiser, schedule and log-probabilities; what differs
is the target: the right answer is given, and nothing says how to get there. Plain letters, in tags or bare, are what
is usually meant by SFT on multiple choice. "named" makes the most of what a question file holds: it has no reasoning to
imitate, but it does say which option is right, and a model may know the words better than their letters.
"""

import time

from torch import Tensor

from data import Question, prompts_of_steps

from .batch import Rollout, completion_logprobs, with_image_features, written_rollout
from .checkpoint import StopRequest, end_step
from .config import Config
from .log import RunLog
from .optimizer import scheduled_rate
from .run import Run


def fine_tune(run: Run, config: Config) -> None:
    """Train `run.policy` by cross-entropy on the right answers; leaves metrics and checkpoints."""
    progress, steps = run.progress, range(run.progress["step"], config.steps)
    prompts_of_step = prompts_of_steps(run.encoder, run.train_questions, steps, config.prompts_per_step, config.seed)
    with StopRequest() as stop, RunLog(config.run_dir, config.method, progress["step"], config.steps) as log:
        for step in steps:
            started = time.perf_counter()
            prompts = next(prompts_of_step)
            if config.freeze_vision:
                prompts = with_image_features(run.policy, prompts)
            targets = [[target(prompt.question, config.sft_answer)] for prompt in prompts]  # a group of one
            answers = written_rollout(run.vocabulary, prompts, targets, config.device)

            loss, probability = accumulate_cross_entropy(run, answers, config)
            rate = scheduled_rate(step, config)
            updated = run.optimizer.step(rate)

            metrics = {name: float(x) for name, x in {"loss": loss, "probability": probability, **updated}.items()}
            seconds = time.perf_counter() - started
            log.record(step, metrics | {"learning_rate": rate, "seconds": seconds})
            progress["step"] = step + 1
            progress["seconds"] += seconds
            progress["tokens"] += int(answers.mask_NGT.sum())
            end_step(config, run.policy, run.optimizer, progress, stop)


def target(question: Question, form: str) -> str:
    """The completion that is trained on: the right letter in answer tags ("tags"), alone ("bare"), or in tags after a
    think block that names its option ("named")."""
    right = question.options[ord(question.answer) - ord("A")]
    forms = {
        "tags": "<answer>{0}</answer>",
        "bare": "{0}",
        "named": "<think>The answer is {1}.</think><answer>{0}</answer>",
    }
    return forms[form].format(question.answer, right)


def accumulate_cross_entropy(run: Run, answers: Rollout, config: Config) -> tuple[Tensor, Tensor]:
    """Gradient of the mean cross-entropy over all answer tokens, end of turn included, a micro-batch at a time.

    Returns the loss (nats per token), and the mean probability of a whole answer.
    """
    total = answers.mask_NGT.sum()  # the divisor, fixed before anything is split
    loss, probability = answers.logp_NGT.new_zeros(()), answers.logp_NGT.new_zeros(())
    for _, prompts, tokens, mask in answers.micro_batches(config.micro_batch_tokens):
        logp, _ = completion_logprobs(run.policy, prompts, tokens, mask, run.vocabulary.allowed_V, temperature=1.0)
        part = -logp.sum() / total
        part.backward()
        run.optimizer.accumulate()
        loss += part.detach()
        probability += logp.detach().sum(-1).exp().sum() / len(answers.prompts)
    return loss, probability
