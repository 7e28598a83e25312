"""Supervised fine-tuning on the right letters (SFT): the baseline that GRPO is compared with.

Same questions in the same order, same prompts and pixels, same optimiser, schedule and
log-probabilities; what differs is the target: the right answer is given, and nothing says how to
get there. Plain letters, in tags or bare, are what is usually meant by SFT on multiple choice.
"named" makes the most of what a question file holds: it has no reasoning to imitate, but it does
say which option is right, and a model may know the words better than their letters.
"""

from torch import Tensor

from common.config import Config
from data import Question
from grpo.optimizer import scheduled_rate
from grpo.rollout import Rollout, completion_logprobs, with_image_features, written_rollout

from .run import Run
from .session import Session


def fine_tune(session: Session, run: Run, config: Config) -> None:
    """Train `run.policy` by cross-entropy on the right answers; leaves metrics and checkpoints."""
    for step, prompts, clock in session:
        if config.freeze_vision:
            prompts = with_image_features(run.policy, prompts)
        targets = [
            [target(prompt.question, config.sft_answer)] for prompt in prompts
        ]  # a group of one
        answers = written_rollout(run.vocabulary, prompts, targets, config.device)

        loss, probability = run.fitted(answers, lambda: accumulate_cross_entropy(run, answers))
        rate = scheduled_rate(step, config)
        stats = {"loss": loss, "probability": probability, **run.update(rate, loss)}
        clock.lap("update")

        session.log.record(
            step, {name: float(x) for name, x in stats.items()} | {"learning_rate": rate}, clock
        )
        session.end_step(step, clock, answers, stats)


def target(question: Question, form: str) -> str:
    """The completion that is trained on: the right letter in answer tags ("tags"), alone ("bare"),
    or in tags after a think block that names its option ("named").
    """
    right = question.options[ord(question.answer) - ord("A")]
    forms = {
        "tags": "<answer>{0}</answer>",
        "bare": "{0}",
        "named": "<think>The answer is {1}.</think><answer>{0}</answer>",
    }
    return forms[form].format(question.answer, right)


def accumulate_cross_entropy(run: Run, answers: Rollout) -> tuple[Tensor, Tensor]:
    """Gradient of the mean cross-entropy over all answer tokens, end of turn included, a
    micro-batch at a time.

    Returns the loss (nats per token), and the mean probability of a whole answer.
    """
    total = answers.mask_NGT.sum()  # the divisor, fixed before anything is split
    loss, probability = answers.logp_NGT.new_zeros(()), answers.logp_NGT.new_zeros(())
    for _, prompts, tokens, mask in run.micro_batches(answers):
        logp, _ = completion_logprobs(
            run.policy, prompts, tokens, mask, run.vocabulary.allowed_V, temperature=1.0
        )
        part = -logp.sum() / total
        part.backward()
        run.optimizer.accumulate()
        loss += part.detach()
        probability += logp.detach().sum(-1).exp().sum() / len(answers.prompts)
    return loss, probability
