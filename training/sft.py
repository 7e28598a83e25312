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
from grpo.rollout import Rollout, completion_logprobs, written_rollout

from .run import Run, smaller_if_memory_is_full

TARGETS = {
    "tags": "<answer>{letter}</answer>",
    "bare": "{letter}",
    "named": "<think>The answer is {option}.</think><answer>{letter}</answer>",
}


def fine_tune(run: Run, config: Config) -> None:
    """Train `run.policy` by cross-entropy on the right answers; leaves metrics and checkpoints."""
    for step in run.steps():
        targets = [[target(prompt.question, config.sft_answer)] for prompt in step.prompts]
        answers = written_rollout(run.vocabulary, step.prompts, targets, config.device)
        with step.phase("update"):
            loss, probability = accumulate_cross_entropy(run, answers)
            run.apply_gradient(step, {"loss": loss, "probability": probability})
        step.keep(answers)


def target(question: Question, form: str) -> str:
    """The completion that is trained on, in one of the forms of `TARGETS`."""
    option = question.options[ord(question.answer) - ord("A")]
    return TARGETS[form].format(letter=question.answer, option=option)


@smaller_if_memory_is_full
def accumulate_cross_entropy(run: Run, answers: Rollout) -> tuple[Tensor, Tensor]:
    """Gradient of the mean cross-entropy over all answer tokens, end of turn included.

    Returns the loss (nats per token), and the mean probability of a whole answer.
    """
    tokens = answers.mask_NGT.sum()  # the divisor, fixed before anything is split
    loss, probability = answers.logp_NGT.new_zeros(()), answers.logp_NGT.new_zeros(())
    for batch in run.micro_batches(answers):
        logp, _ = completion_logprobs(run.policy, batch, run.vocabulary.allowed_V, temperature=1.0)
        batch_loss = -logp.sum() / tokens
        batch_loss.backward()
        run.optimizer.accumulate()
        loss += batch_loss.detach()
        probability += logp.detach().sum(-1).exp().sum() / len(answers.prompts)
    return loss, probability
