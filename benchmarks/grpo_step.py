"""Time whole GRPO steps (rollout, rewards, reference, update, optimiser), of the very code that
train.py runs.

    python -m benchmarks.grpo_step --checkpoint 46m --prompts 2 --group 8 --tokens 64 --side 448
    --steps 4

Completions have a fixed length: the end of turn can't be sampled. Prints one JSON line; all seconds
are medians over the steps after a warm-up of two.
"""

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from torch import Tensor

import grpo.rollout
import grpo.sampler
import model.cache
import model.linear
import training.run
from common.config import Config
from data import prompts_of_steps
from model.attention import two_part_attention
from model.logprobs import naive_logprobs
from train import grpo_step
from training.run import Run, prepared
from training.step import Step

from .common import endless, on_checkpoint, program, step_config, summary

WITHOUT = {
    "oneDNN": lambda: setattr(model.linear, "_HAS_ONEDNN", False),
    "arranged weights": lambda: setattr(grpo.sampler, "arranged", lambda *_, **__: nullcontext()),
    "kept memory": lambda: setattr(training.run, "keep_freed_memory", lambda: None),
    "merged attention": lambda: setattr(model.cache, "merged_attention", _unmerged_attention),
    "dropping the finished": lambda: setattr(grpo.sampler, "SHRINK_AT", 0.0),
    "blocked log-probs": lambda: setattr(grpo.rollout, "token_logprobs", naive_logprobs),
}
"""How each of FAST_PATHS is left out: its slow twin takes its place in this process."""


def _unmerged_attention(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, bias: Tensor
) -> Tensor:
    own = (x.unflatten(0, q.shape[:2]) for x in (own_k, own_v))
    return two_part_attention(q, prompt_k, prompt_v, *own, bias[:, 0, 0] == 0, None)


def measured_steps(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, object]:
    """Run the steps that the arguments describe on a checkpoint; `folder` is for what a run
    writes.
    """
    for name in args.without:
        WITHOUT[name]()
    config = step_config(checkpoint, folder, args)
    with redirect_stdout(sys.stderr), prepared(config) as run:
        return timed_steps(run, config, args)


def timed_steps(run: Run, config: Config, args: argparse.Namespace) -> dict[str, object]:
    run.vocabulary = endless(run.vocabulary, run.policy.config, args.ending)
    laps, counts, steps = [], [], range(config.steps)
    prompts_of = prompts_of_steps(run.encoder, run.train_questions, steps, args.prompts, 0)
    for number, prompts in zip(steps, prompts_of, strict=True):
        step = Step(number, prompts, args.device)
        grpo_step(run, step, config)
        counts.append(int(step.rollout.mask_NGT.sum()))
        assert args.ending or counts[-1] == args.prompts * args.group * args.tokens
        laps.append(step.seconds)
        print(f"step {number}: {sum(step.seconds.values()):.2f} s", file=sys.stderr)
    return summary(laps, counts, args) | {"prompt_tokens": len(prompts[0].tokens_P)}


if __name__ == "__main__":
    sys.exit(program(lambda: on_checkpoint(measured_steps, "grpo_step", __doc__.split("\n")[0])))
