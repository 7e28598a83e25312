"""Shared by the programs of this folder: arguments, inputs and output."""

import argparse
import json
import platform
import re
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from common.config import Config
from common.errors import InputError
from common.program import run_program
from data import PromptEncoder, Question, Vocabulary, prompts_of_steps
from model import Qwen2VLConfig
from training.step import Step

from .shapes import SHAPES, make_checkpoint, make_questions

# Steps that are not counted: libraries load, and the memory of the process grows to its full size.
WARM_UP = 2

# The fast paths that `benchmarks.grpo_step --without` can replace.
FAST_PATHS = (
    "oneDNN",
    "arranged weights",
    "kept memory",
    "merged attention",
    "dropping the finished",
    "blocked log-probs",
)

# Arguments that are whole numbers: minimum, default, help.
_NUMBERS = {
    "--prompts": (1, 2, "prompts per step"),
    "--group": (2, 8, "completions per prompt"),
    "--tokens": (1, 64, "tokens per completion, exactly"),
    "--side": (56, 448, "images have side x side pixels"),
    "--steps": (1, 4, f"steps to measure, after {WARM_UP} warm-up steps"),
    "--micro-batch-tokens": (1, 1024, "tokens per forward and backward pass"),
}

Measurement = Callable[[argparse.Namespace, Path, Path], dict[str, object]]


def run_measurement(program: str, description: str, measure: Measurement) -> int:
    """Run `measure(arguments, checkpoint, output folder)` with the arguments of the command line.

    Prints the result as one line of JSON. Returns the exit code.
    """
    parser = argument_parser(f"python -m benchmarks.{program}", description)
    return run_program("benchmarks", partial(_print_measurement, parser, measure))


def _print_measurement(parser: argparse.ArgumentParser, measure: Measurement) -> None:
    args = parser.parse_args()
    # Checked first, because a large checkpoint takes a while to make.
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device is {args.device!r}, but torch finds no CUDA GPU; use cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = measure(args, checkpoint_folder(args.checkpoint, folder), folder / "work")
    print(json.dumps(result))


def argument_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The command line of all programs that run steps."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(program, None, description, formatter_class=with_defaults)
    shapes, fast_paths = ", ".join(SHAPES), ", ".join(map(repr, FAST_PATHS))
    parser.add_argument("--checkpoint", default="46m", help=f"a folder, or a shape: {shapes}")
    for name, (lowest, default, text) in _NUMBERS.items():
        parser.add_argument(name, type=partial(at_least, lowest), default=default, help=text)
    parser.add_argument("--beta", type=float, default=0.04, help="0: without the reference model")
    parser.add_argument(
        "--ending",
        type=float,
        default=0.0,
        help="share of ids that end a completion, up to --tokens tokens",
    )
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        choices=FAST_PATHS,
        metavar="WHAT",
        help=f"replace these by their slow twins: {fast_paths}",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser


def at_least(lowest: int, text: str) -> int:
    """Parse a whole number. An error of the command line if it is below `lowest`."""
    if int(text) < lowest:
        raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {text}")
    return int(text)


def checkpoint_folder(name: str, folder: Path) -> Path:
    """The checkpoint of that name; if it is a shape, one is made under `folder`."""
    if name in SHAPES:
        return make_checkpoint(name, folder / name)
    if not Path(name).is_dir():
        shapes = ", ".join(SHAPES)
        raise InputError(f"--checkpoint {name}: neither a folder nor one of the shapes {shapes}")
    return Path(name)


def step_config(checkpoint: Path, folder: Path, args: argparse.Namespace) -> Config:
    """The config of the run that the arguments describe. Writes its questions to `folder`."""
    steps = args.steps + WARM_UP
    return Config(
        model=str(checkpoint),
        train_questions=str(make_questions(args.prompts * steps, args.side, folder)),
        run_dir=str(folder / "run"),
        prompts_per_step=args.prompts,
        group_size=args.group,
        max_new_tokens=args.tokens,
        steps=steps,
        beta=args.beta,
        dtype=args.dtype,
        device=args.device,
        max_pixels=args.side**2,  # so that images are not resized
        micro_batch_tokens=args.micro_batch_tokens,
        max_prompt_tokens=1024 + args.side**2,  # more than any prompt has
    )


def endless(vocabulary: Vocabulary, shape: Qwen2VLConfig, ending: float = 0.0) -> Vocabulary:
    """A vocabulary in which all embedding rows may be sampled, except end of turn and images.

    With `ending`, that share of all rows ends a completion. Under random weights, each token then
    ends its completion with about that probability.
    """
    allowed_V = torch.ones_like(vocabulary.allowed_V)
    allowed_V[[*vocabulary.end_ids, *shape.vision_token_ids]] = False
    if not ending:
        return replace(vocabulary, allowed_V=allowed_V)
    # Spread over all rows, so that their probabilities add up to about the same share.
    ends = torch.arange(0, len(allowed_V), round(1 / ending))
    return replace(vocabulary, allowed_V=allowed_V, end_ids=tuple(ends[allowed_V[ends]].tolist()))


def measured(
    encoder: PromptEncoder, questions: Sequence[Question], args: argparse.Namespace
) -> Iterator[Step]:
    """Yield the steps of a measurement, including warm-up, and print the time that each took."""
    numbers = range(args.steps + WARM_UP)
    batches = prompts_of_steps(encoder, questions, numbers, args.prompts, seed=0)
    for number, prompts in zip(numbers, batches, strict=True):
        step = Step(number, list(prompts.values()), args.device, list(prompts))
        yield step
        print(f"step {number}: {sum(step.seconds.values()):.2f} s", file=sys.stderr)


def summary(
    laps: list[dict[str, float]], counts: list[int], args: argparse.Namespace
) -> dict[str, object]:
    """The result to print: medians over the steps after warm-up, memory, machine, arguments.

    Args:
        laps: seconds by phase of each step.
        counts: completion tokens of each step.
    """
    counted = laps[WARM_UP:]
    seconds = {phase: statistics.median(lap[phase] for lap in counted) for phase in counted[0]}
    # Separately, because the medians of the phases do not add up to the median of a step.
    steps = [sum(lap.values()) for lap in counted]
    tokens = statistics.median(counts[WARM_UP:])
    return {
        "seconds_per_step": statistics.median(steps),
        "spread": [min(steps), max(steps)],
        "seconds": seconds,
        "rollout_tokens_per_second": tokens / seconds["rollout"],
        "tokens_per_second": tokens / statistics.median(steps),
        **peak_memory(args.device),
        **machine(args.device),
        **vars(args),
    }


def peak_memory(device: str) -> dict[str, float]:
    """Peak memory of this process in MB (10^6 bytes), and on a GPU that of torch's tensors."""
    # Linux counts in KB.
    peak = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}
    if device.startswith("cuda"):
        peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return peak


def machine(device: str) -> dict[str, object]:
    """The machine that a figure was measured on."""
    name, cpus = platform.processor(), Path("/proc/cpuinfo")
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif cpus.exists():  # on Linux, `platform` may know only the architecture
        name = re.findall(r"model name\s*: (.*)", cpus.read_text() + f"model name: {name}")[0]
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
