"""Compare our GRPO steps with those of other libraries: ratios, pair by pair.

    python -m benchmarks.peers --side 448 --rounds 3

Takes the arguments of `benchmarks.grpo_step`. Peers: "transformers" is its model with `generate`
and a plain replicated update (benchmarks/peer_transformers.py); "trl" is TRL's GRPOTrainer
(benchmarks/peer_trl.py), if the `bench` extra is installed. Each measurement has a process of its
own. A ratio is theirs over ours in the same round: a machine that slows down slows both.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.program import run_program

from .common import argument_parser, at_least, checkpoint_folder

Result = dict[str, Any]
MODULES = {"ours": "grpo_step", "transformers": "peer_transformers", "trl": "peer_trl"}


def memory_of(result: Result) -> float:
    """Peak memory in MB: of the GPU if there is one."""
    return result["peak_gpu_mb" if "peak_gpu_mb" in result else "peak_rss_mb"]


def compare(
    args: argparse.Namespace, variants: dict[str, dict[str, Any]], rounds: int
) -> dict[str, list[Result]]:
    """The results of each variant by name, one per round.

    A variant lists the arguments that differ. If its name is in MODULES, that peer runs it.
    """
    results: dict[str, list[Result]] = {name: [] for name in variants}
    # The variants take turns: a machine that slows down slows all of them.
    for _ in range(rounds):
        for name, changed in variants.items():
            results[name].append(_run(name, vars(args) | changed))
    return results


def _run(name: str, options: dict[str, Any]) -> Result:
    flags = []
    for key, value in options.items():
        if key not in ("rounds", "peers", "without"):  # two that programs don't take, and a list
            flags.append(f"--{key.replace('_', '-')}={value}")
    if options["without"]:
        flags += ["--without", *options["without"]]
    result = run_alone(MODULES.get(name, "grpo_step"), *flags)
    print(f"  {name}: {result['seconds_per_step']:.2f} s per step", file=sys.stderr)
    return result


def run_alone(module: str, *flags: str) -> Result:
    """Run a program of this folder and return the JSON of its last line. InputError if it fails."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
    print(" ".join(command[2:]), file=sys.stderr)
    # In a process of its own, because the peak memory of a process never goes down.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{command[2]} failed; its error is above")
    return json.loads(done.stdout.splitlines()[-1])  # TRL prints other lines before it


def ratios(ours: Sequence[Result], theirs: Sequence[Result]) -> dict[str, list[float]]:
    """Theirs over ours, pair by pair, for each of `_costs`."""
    pairs = [(_costs(our), _costs(their)) for our, their in zip(ours, theirs, strict=True)]
    return {name: [their[name] / our[name] for our, their in pairs] for name in pairs[0][1]}


def _costs(result: Result) -> dict[str, float]:
    """Quantities of which less is better: seconds per step and memory.

    With times by phase (not from TRL), also seconds per rollout token and of the update.
    """
    costs = {"step": result["seconds_per_step"], "memory": memory_of(result)}
    if "seconds" in result:
        costs["rollout"] = 1 / result["rollout_tokens_per_second"]
        costs["update"] = result["seconds"]["update"]
    return costs


def median_and_range(values: Sequence[float], digits: int = 1) -> str:
    """The values as "2.1 (1.9 to 2.4)"."""
    numbers = statistics.median(values), min(values), max(values)
    return "{} ({} to {})".format(*(f"{number:.{digits}f}" for number in numbers))


def installed_peers() -> list[str]:
    """The peers whose library is installed."""
    return [name for name in ("transformers", "trl") if importlib.util.find_spec(name)]


def work() -> None:
    """Run the command line: measure, and print each ratio and its pairs."""
    parser = argument_parser("python -m benchmarks.peers", __doc__.split("\n")[0])
    peers, trl = installed_peers(), "trl needs pip install -e '.[bench]'"
    parser.add_argument("--rounds", type=partial(at_least, 1), default=3, help="pairs to measure")
    parser.add_argument("--peers", nargs="+", default=peers, choices=peers, help=trl)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.checkpoint = str(checkpoint_folder(args.checkpoint, Path(folder)))
        variants: dict[str, dict[str, Any]] = {name: {} for name in ("ours", *args.peers)}
        results = compare(args, variants, args.rounds)
    for peer in args.peers:
        for name, values in ratios(results["ours"], results[peer]).items():
            pairs = ", ".join(f"{value:.2f}" for value in values)
            print(f"{peer} / ours, {name}: {median_and_range(values)}; pairs {pairs}")


if __name__ == "__main__":
    sys.exit(run_program("benchmarks", work))
