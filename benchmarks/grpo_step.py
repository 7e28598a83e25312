"""Time whole GRPO steps (rollout, rewards, reference, update, optimiser), of the very code that train.py runs.

    python -m benchmarks.grpo_step --checkpoint 46m --prompts 2 --group 8 --tokens 64 --side 448 --steps 4

Completions have a fixed length: the end of turn can't be sampled. Prints one JSON line; all seconds are medians over
the steps after one warm-up step.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from data import prompts_of_steps
from grpo.config import Config
from grpo.log import Stopwatch
from grpo.run import prepare
from model import InputError
from train import grpo_step

from .shapes import SHAPES, make_checkpoint, make_questions


def measured_steps(checkpoint: Path, folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Run the steps that the arguments describe on a checkpoint; `folder` is for what a run writes."""
    config = Config(
        model=str(checkpoint), train_questions=str(make_questions(args.prompts * (args.steps + 1), args.side, folder)),
        run_dir=str(folder / "run"), prompts_per_step=args.prompts, group_size=args.group, max_new_tokens=args.tokens,
        steps=args.steps + 1, beta=args.beta, dtype=args.dtype, device=args.device, max_pixels=args.side**2,
        micro_batch_prompts=1,
    )  # fmt: skip
    with redirect_stdout(sys.stderr):
        run = prepare(config)
    endless_V = run.vocabulary.allowed_V.clone()
    endless_V[list(run.vocabulary.end_ids)] = False
    run = replace(run, vocabulary=replace(run.vocabulary, allowed_V=endless_V))

    laps: list[dict[str, float]] = []
    steps = range(config.steps)
    for step, prompts in zip(steps, prompts_of_steps(run.encoder, run.train_questions, steps, args.prompts, 0)):
        clock = Stopwatch(args.device)
        rollout, *_ = grpo_step(run, config, step, prompts, clock)
        assert rollout.mask_NGT.shape == (args.prompts, args.group, args.tokens) and rollout.mask_NGT.all()
        laps.append(clock.laps | {"step": clock.total})
        print(f"step {step}: {clock.total:.2f} s", file=sys.stderr)
    seconds = {phase: statistics.median(lap[phase] for lap in laps[1:]) for phase in laps[0]}
    completion_tokens = args.prompts * args.group * args.tokens
    return {
        "seconds_per_step": seconds.pop("step"),
        "seconds": seconds,
        "spread": [min(lap["step"] for lap in laps[1:]), max(lap["step"] for lap in laps[1:])],
        "rollout_tokens_per_second": completion_tokens / seconds["rollout"],
        "tokens_per_second": completion_tokens / sum(seconds.values()),
        "prompt_tokens": len(prompts[0].tokens_P),
        **peak_memory(args.device),
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


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which `benchmarks.peers` shares."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_step", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="46m", help=f"folder, or a shape to make: {', '.join(SHAPES)}")
    parser.add_argument("--prompts", type=int, default=2, help="prompts a step (default: 2)")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a completion, exactly (default: 64)")
    parser.add_argument("--side", type=int, default=448, help="images are side x side pixels (default: 448)")
    parser.add_argument("--steps", type=int, default=4, help="steps counted, after one that is not (default: 4)")
    parser.add_argument("--beta", type=float, default=0.04, help="0 leaves the reference out (default: 0.04)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args(given)


def checkpoint_folder(name: str, folder: Path) -> Path:
    """The checkpoint called on the command line, made under `folder` if it is a shape's name."""
    return make_checkpoint(name, folder / name) if name in SHAPES else Path(name)


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = measured_steps(checkpoint_folder(args.checkpoint, Path(folder)), Path(folder) / "work", args)
        except InputError as error:
            print(f"benchmarks.grpo_step: {error}", file=sys.stderr)
            return 2
    print(json.dumps(result | vars(args) | machine(args.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
