"""Time whole GRPO steps (rollout, rewards, reference, update, optimiser), of the very code that train.py runs.

    python -m benchmarks.grpo_step --checkpoint 46m --prompts 2 --group 8 --tokens 64 --side 448 --steps 4

Completions have a fixed length: the end of turn can't be sampled. Prints one JSON line; all seconds are medians over
the steps after a warm-up of two.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import grpo.batch
import grpo.run
import grpo.sampler
import model.cache
import model.linear
from data import Vocabulary, prompts_of_steps
from grpo.config import Config
from grpo.log import Stopwatch
from grpo.run import prepare
from model import InputError, Qwen2VLConfig
from model.attention import two_part_attention
from model.logprobs import naive_logprobs
from train import grpo_step

from .shapes import SHAPES, make_checkpoint, make_questions

WARM_UP = 2
"""Steps that are not counted: libraries load, and the process's memory grows to what it needs."""

WITHOUT = {
    "oneDNN": lambda: setattr(model.linear, "_HAS_ONEDNN", False),
    "arranged weights": lambda: setattr(grpo.sampler, "arranged", lambda *_, **__: nullcontext()),
    "kept memory": lambda: setattr(grpo.run, "keep_freed_memory", lambda: None),
    "merged attention": lambda: setattr(model.cache, "merged_attention", _unmerged_attention),
    "dropping the finished": lambda: setattr(grpo.sampler, "SHRINK_AT", 0.0),
    "blocked log-probs": lambda: setattr(grpo.batch, "token_logprobs", naive_logprobs),
}
"""What can be left out, to see what it is worth on a machine: the slow twin takes its place in this process."""


def _unmerged_attention(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, bias: Tensor
) -> Tensor:
    own = (x.unflatten(0, q.shape[:2]) for x in (own_k, own_v))
    return two_part_attention(q, prompt_k, prompt_v, *own, bias[:, 0, 0] == 0, None)


def measured_steps(checkpoint: Path, folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Run the steps that the arguments describe on a checkpoint; `folder` is for what a run writes."""
    for name in args.without:
        WITHOUT[name]()
    config = step_config(checkpoint, folder, args)
    with redirect_stdout(sys.stderr):
        run = prepare(config)
    run = replace(run, vocabulary=endless(run.vocabulary, run.policy.config, args.ending))
    laps, counts, steps = [], [], range(config.steps)
    for step, prompts in zip(steps, prompts_of_steps(run.encoder, run.train_questions, steps, args.prompts, 0)):
        clock = Stopwatch(args.device)
        rollout, *_ = grpo_step(run, config, step, prompts, clock)
        counts.append(int(rollout.mask_NGT.sum()))
        assert args.ending or counts[-1] == args.prompts * args.group * args.tokens
        laps.append(clock.laps)
        print(f"step {step}: {clock.total:.2f} s", file=sys.stderr)
    return summary(laps, counts, args) | {"prompt_tokens": len(prompts[0].tokens_P)}


def step_config(checkpoint: Path, folder: Path, args: argparse.Namespace) -> Config:
    """The run that the arguments describe; its questions are made in `folder`."""
    return Config(
        model=str(checkpoint), train_questions=str(make_questions(args.prompts * (args.steps + WARM_UP), args.side, folder)),
        run_dir=str(folder / "run"), prompts_per_step=args.prompts, group_size=args.group, max_new_tokens=args.tokens,
        steps=args.steps + WARM_UP, beta=args.beta, dtype=args.dtype, device=args.device, max_pixels=args.side**2,
        micro_batch_tokens=args.micro_batch_tokens,
    )  # fmt: skip


def endless(vocabulary: Vocabulary, shape: Qwen2VLConfig, ending: float = 0.0) -> Vocabulary:
    """Every row of the embedding may be sampled, as if the tokenizer used them all, but no end of turn and no image.

    With `ending`, that share of all rows ends a completion: under random weights, about that share of its tokens.
    """
    vision = (shape.image_token_id, shape.video_token_id, shape.vision_start_token_id, shape.vision_end_token_id)
    allowed_V = torch.ones_like(vocabulary.allowed_V)
    allowed_V[[*vocabulary.end_ids, *vision]] = False
    if ending:
        ends = range(0, len(allowed_V), round(1 / ending))
        return replace(vocabulary, allowed_V=allowed_V, end_ids=tuple(i for i in ends if allowed_V[i]))
    return replace(vocabulary, allowed_V=allowed_V)


def summary(laps: list[dict[str, float]], counts: list[int], args: argparse.Namespace) -> dict[str, object]:
    """What is printed, of seconds by phase and completion tokens of each step: medians over the steps after the warm-up,
    memory, the machine and the arguments."""
    seconds = {phase: statistics.median(lap[phase] for lap in laps[WARM_UP:]) for phase in laps[0]}
    whole = [sum(lap.values()) for lap in laps[WARM_UP:]]
    tokens = statistics.median(counts[WARM_UP:])
    return {
        "seconds_per_step": statistics.median(whole),
        "spread": [min(whole), max(whole)],
        "seconds": seconds,
        "rollout_tokens_per_second": tokens / seconds["rollout"],
        "tokens_per_second": tokens / statistics.median(whole),
        **peak_memory(args.device),
        **machine(args.device),
        **vars(args),
    }


def peak_memory(device: str) -> dict[str, float]:
    """Most memory that this process has held, in MB (10^6 bytes): all of it, and on a GPU torch's share of that."""
    peak = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}
    if device.startswith("cuda"):
        peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return peak


def machine(device: str) -> dict[str, object]:
    """What a figure was measured on."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else (model or [platform.processor()])[0]
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().split("\n") if Path(path).exists() else []


def argument_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The command line that all programs share which take steps."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--checkpoint", default="46m", help=f"folder, or a shape to make: {', '.join(SHAPES)}")
    parser.add_argument("--prompts", type=_at_least(1), default=2, help="prompts a step (default: 2)")
    parser.add_argument("--group", type=_at_least(2), default=8, help="completions a prompt (default: 8)")
    parser.add_argument("--tokens", type=_at_least(1), default=64, help="tokens a completion, exactly (default: 64)")
    parser.add_argument("--side", type=_at_least(56), default=448, help="images are side x side pixels (default: 448)")
    parser.add_argument(
        "--steps", type=_at_least(1), default=4, help=f"steps counted, after {WARM_UP} that are not (default: 4)"
    )
    parser.add_argument("--beta", type=float, default=0.04, help="0 leaves the reference out (default: 0.04)")
    parser.add_argument(
        "--micro-batch-tokens", type=_at_least(1), default=1024, help="as in the config (default: 1024)"
    )
    parser.add_argument(
        "--ending", type=float, default=0.0, help="share of ids that end a completion; --tokens is then the limit"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=WITHOUT, metavar="WHAT",
        help=f"replace by their slow twins: {', '.join(repr(name) for name in WITHOUT)}",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest}")
        return int(text)

    return number


def checkpoint_folder(name: str, folder: Path) -> Path:
    """The checkpoint called on the command line, made under `folder` if it is a shape's name."""
    return make_checkpoint(name, folder / name) if name in SHAPES else Path(name)


def main() -> int:
    args = argument_parser("python -m benchmarks.grpo_step", __doc__.split("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = measured_steps(checkpoint_folder(args.checkpoint, Path(folder)), Path(folder) / "work", args)
        except InputError as error:
            print(f"benchmarks.grpo_step: {error}", file=sys.stderr)
            return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
