"""What the programs of this folder share: their arguments, what they measure on, and how they tell
it.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common.config import Config
from common.errors import InputError
from data import Vocabulary
from model import Qwen2VLConfig

from .shapes import SHAPES, make_checkpoint, make_questions

WARM_UP = 2
"""Steps that are not counted: libraries load, and the process's memory grows to what it needs."""

FAST_PATHS = (
    "oneDNN", "arranged weights", "kept memory", "merged attention", "dropping the finished", "blocked log-probs",
)  # fmt: skip
"""What `benchmarks.grpo_step --without` can leave out."""


def program(work: Callable[[], dict | None]) -> int:
    """Run a program's work, print its result as one line of JSON, and give its exit code: one line
    for what is wrong.
    """
    try:
        result = work()
    except InputError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: stopped", file=sys.stderr)
        return 130
    if result is not None:
        print(json.dumps(result))
    return 0


def on_checkpoint(
    measure: Callable[[argparse.Namespace, Path, Path], dict], name: str, description: str
) -> dict:
    """`measure(arguments, checkpoint, folder for what it writes)` as the command line of program
    `name` says.
    """
    args = argument_parser(f"python -m benchmarks.{name}", description).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if (
            args.device != "cpu" and not torch.cuda.is_available()
        ):  # said before a large checkpoint is made
            raise InputError(f"--device is {args.device!r}, but torch finds no CUDA GPU; give cpu")
        return measure(
            args, checkpoint_folder(args.checkpoint, Path(folder)), Path(folder) / "work"
        )


def step_config(checkpoint: Path, folder: Path, args: argparse.Namespace) -> Config:
    """The run that the arguments describe; its questions are made in `folder`."""
    return Config(
        model=str(checkpoint), train_questions=str(make_questions(args.prompts * (args.steps + WARM_UP), args.side, folder)),
        run_dir=str(folder / "run"), prompts_per_step=args.prompts, group_size=args.group, max_new_tokens=args.tokens,
        steps=args.steps + WARM_UP, beta=args.beta, dtype=args.dtype, device=args.device, max_pixels=args.side**2,
        micro_batch_tokens=args.micro_batch_tokens, max_prompt_tokens=1024 + args.side**2,
    )  # fmt: skip


def endless(vocabulary: Vocabulary, shape: Qwen2VLConfig, ending: float = 0.0) -> Vocabulary:
    """Every row of the embedding may be sampled, as if the tokenizer used them all, but no end of
    turn and no image.

    With `ending`, that share of all rows ends a completion: under random weights, about that share
    of its tokens.
    """
    vision = (
        shape.image_token_id,
        shape.video_token_id,
        shape.vision_start_token_id,
        shape.vision_end_token_id,
    )
    allowed_V = torch.ones_like(vocabulary.allowed_V)
    allowed_V[[*vocabulary.end_ids, *vision]] = False
    if ending:
        ends = range(0, len(allowed_V), round(1 / ending))
        return replace(
            vocabulary, allowed_V=allowed_V, end_ids=tuple(i for i in ends if allowed_V[i])
        )
    return replace(vocabulary, allowed_V=allowed_V)


def summary(
    laps: list[dict[str, float]], counts: list[int], args: argparse.Namespace
) -> dict[str, object]:
    """What is printed, of seconds by phase and completion tokens of each step: medians over the
    steps after the warm-up, memory, the machine and the arguments.
    """
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
    """Most memory that this process has held, in MB (10^6 bytes): all of it, and on a GPU torch's
    share of that.
    """
    peak = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}
    if device.startswith("cuda"):
        peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return peak


def machine(device: str) -> dict[str, object]:
    """What a figure was measured on."""
    model = [
        line.split(":")[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else (model or [platform.processor()])[0]
    )
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().split("\n") if Path(path).exists() else []


def argument_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The command line that all programs share which take steps."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument(
        "--checkpoint", default="46m", help=f"folder, or a shape to make: {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--prompts", type=at_least(1), default=2, help="prompts a step (default: 2)"
    )
    parser.add_argument(
        "--group", type=at_least(2), default=8, help="completions a prompt (default: 8)"
    )
    parser.add_argument(
        "--tokens", type=at_least(1), default=64, help="tokens a completion, exactly (default: 64)"
    )
    parser.add_argument(
        "--side",
        type=at_least(56),
        default=448,
        help="images are side x side pixels (default: 448)",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=4,
        help=f"steps counted, after {WARM_UP} that are not (default: 4)",
    )
    parser.add_argument(
        "--beta", type=float, default=0.04, help="0 leaves the reference out (default: 0.04)"
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=at_least(1),
        default=1024,
        help="tokens of a forward and backward (default: 1024)",
    )
    parser.add_argument(
        "--ending",
        type=float,
        default=0.0,
        help="share of ids that end a completion; --tokens is then the limit",
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=FAST_PATHS, metavar="WHAT",
        help=f"replace by their slow twins: {', '.join(repr(name) for name in FAST_PATHS)}",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser


def at_least(lowest: int) -> Callable[[str], int]:
    """An argument's type: a whole number, no smaller than that."""

    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest}")
        return int(text)

    return number


def checkpoint_folder(name: str, folder: Path) -> Path:
    """The checkpoint called on the command line, made under `folder` if it is a shape's name."""
    if name in SHAPES:
        return make_checkpoint(name, folder / name)
    if not Path(name).is_dir():
        raise InputError(
            f"--checkpoint {name}: no such folder, and none of the shapes {', '.join(SHAPES)}"
        )
    return Path(name)


class Stopwatch:
    """Seconds of a step by phase: `laps` by name, and their `total`."""

    def __init__(self, device: str) -> None:
        self.laps: dict[str, float] = {}
        self.device = device
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on `phase`; it waits for the device to finish."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.laps.values())
