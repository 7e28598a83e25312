"""Supervised fine-tuning (SFT) on the correct answers: the baseline for GRPO.

Questions and their order, prompts, pixels, optimiser, schedule and log-probabilities are the same
as in GRPO. Only the target differs: SFT is given the correct answer, without any reasoning. SFT on
multiple choice usually means the letter alone, in tags or bare. "named" uses the question file to
the full: it contains no reasoning to imitate, but it does name the correct option, and a model may
know the option's words better than its letter.
"""

from torch import Tensor

from common.config import Config
from data import Question
from grpo.rollout import Rollout, completion_logprobs, written_rollout

from .run import Run, smaller_if_memory_is_full

TARGETS = {
    "tags": "<answer>{letter}</answer>",
    "bare": "{letter}",
    "named": "<think>The answer is {option}.</think><answer>{letter}</answer>",
}


def fine_tune(run: Run, config: Config) -> None:
    """Train `run.policy` with cross-entropy on the correct answers."""
    for step in run.steps():
        targets = [[target(prompt.question, config.sft_answer)] for prompt in step.prompts]
        answers = written_rollout(run.vocabulary, step.prompts, targets, config.device)
        answers, _ = run.ranks.whole(answers, ())
        with step.phase("update"):
            loss, probability = accumulate_cross_entropy(run, answers)
            run.apply_gradient(step, {"loss": loss, "probability": probability})
        step.keep(answers)


def target(question: Question, form: str) -> str:
    """The completion to train on, in one of the forms of `TARGETS`."""
    option = question.options[ord(question.answer) - ord("A")]
    return TARGETS[form].format(letter=question.answer, option=option)


@smaller_if_memory_is_full
def accumulate_cross_entropy(run: Run, answers: Rollout) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the mean cross-entropy over all tokens, end of turn included.

    Returns the loss (nats per token) and the mean probability of a whole answer.
    """
    tokens = answers.mask_NGT.sum()  # the divisor of the whole step, not of a micro-batch
    loss, probability = answers.logp_NGT.new_zeros(()), answers.logp_NGT.new_zeros(())
    for batch in run.micro_batches(answers):
        logp, _ = completion_logprobs(run.policy, batch, run.vocabulary.allowed_V, temperature=1.0)
        batch_loss = -logp.sum() / tokens
        batch_loss.backward()
        run.optimizer.accumulate()
        loss += batch_loss.detach()
        probability += logp.detach().sum(-1).exp().sum() / len(answers.prompts)
    return loss, probability
