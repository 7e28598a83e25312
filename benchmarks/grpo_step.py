"""Time whole GRPO steps (rollout, rewards, reference, update, optimiser), run by train.py's code.

    python -m benchmarks.grpo_step --checkpoint 46m --prompts 2 --group 8 --tokens 64 --side 448
    --steps 4

Completions have a fixed length: the end of turn can't be sampled. Prints one JSON line. All times
are medians in seconds over the steps after a warm-up of two.
"""

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import grpo.rollout
import grpo.sampler
import model.cache
import model.linear
import training.prepare
from model.attention import two_part_attention
from model.logprobs import naive_logprobs
from train import grpo_step
from training.prepare import prepared

from .common import endless, measured, run_measurement, step_config, summary


# The slow twin of a preparation, whether a call or a context: it does nothing.
def _nothing(*_: object, **__: object) -> nullcontext:
    return nullcontext()


# For each of FAST_PATHS, the module and attribute to replace, and its slow twin.
WITHOUT: dict[str, tuple[Any, str, object]] = {
    "oneDNN": (model.linear, "_HAS_ONEDNN", False),
    "arranged weights": (grpo.sampler, "arranged", _nothing),
    "kept memory": (training.prepare, "keep_freed_memory", _nothing),
    "merged attention": (model.cache, "merged_attention", two_part_attention),
    "dropping the finished": (grpo.sampler, "SHRINK_AT", 0.0),
    "blocked log-probs": (grpo.rollout, "token_logprobs", naive_logprobs),
}


def measured_steps(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, object]:
    """Run the steps that the arguments describe; the run writes to `folder`."""
    # This lasts until the process ends, so every measurement has a process of its own.
    for name in args.without:
        setattr(*WITHOUT[name])
    config = step_config(checkpoint, folder, args)
    # The output of the run would mix with the line of JSON.
    laps, counts = [], []
    with redirect_stdout(sys.stderr), prepared(config) as run:
        run.vocabulary = endless(run.vocabulary, run.policy.config, args.ending)
        for step in measured(run.encoder, run.questions.train, args):
            grpo_step(run, step, config)
            assert step.rollout is not None
            counts.append(int(step.rollout.mask_NGT.sum()))
            # A completion that ended early would make the step look fast.
            assert args.ending or counts[-1] == args.prompts * args.group * args.tokens
            laps.append(step.seconds)
    return summary(laps, counts, args) | {"prompt_tokens": len(step.prompts[0].tokens_P)}


if __name__ == "__main__":
    sys.exit(run_measurement("grpo_step", __doc__.split("\n")[0], measured_steps))
