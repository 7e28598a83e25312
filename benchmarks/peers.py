"""The same GRPO steps by us and by others, in turn, in processes of their own: ratios, pair by
pair.

    python -m benchmarks.peers --side 448 --rounds 3

Takes the arguments of `benchmarks.grpo_step`. Peers: "transformers" is its model with `generate`
and a plain replicated update (benchmarks/peer_transformers.py); "trl" is TRL's GRPOTrainer
(benchmarks/peer_trl.py), where the `bench` extra is installed. A ratio is theirs over ours, of one
round: a machine that slows down slows both.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError

from .common import argument_parser, at_least, checkpoint_folder, program

MODULES = {"ours": "grpo_step", "transformers": "peer_transformers", "trl": "peer_trl"}
RATIOS = {
    "step": lambda ours, theirs: theirs["seconds_per_step"] / ours["seconds_per_step"],
    "memory": lambda ours, theirs: theirs[memory_of(theirs)] / ours[memory_of(ours)],
    "rollout": lambda ours, theirs: (
        ours["rollout_tokens_per_second"] / theirs["rollout_tokens_per_second"]
    ),
    "update": lambda ours, theirs: theirs["seconds"]["update"] / ours["seconds"]["update"],
}
"""How much ours is better, of two results."""


def memory_of(result: dict) -> str:
    """Which memory counts: the GPU's where there is one."""
    return "peak_gpu_mb" if "peak_gpu_mb" in result else "peak_rss_mb"


def run(name: str, args: argparse.Namespace, **changed: object) -> dict:
    """One result of `name` (of MODULES) in a process of its own, with the arguments, some of them
    changed.
    """
    given = vars(args) | changed
    without = given.pop("without")
    options = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in given.items()
        if key not in ("rounds", "peers")
    ]
    options += ["--without", *without] if without else []
    command = [sys.executable, "-m", f"benchmarks.{MODULES[name]}", *options]
    print(f"{name}: {' '.join(command[2:])}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise InputError(done.stderr.strip().split("\n")[-1].removeprefix("benchmarks: "))
    if done.returncode:
        raise InputError(f"{name} failed; its last words:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().split("\n")[-1])
    print(
        f"  {result['seconds_per_step']:.2f} s a step, {result[memory_of(result)]:,.0f} MB",
        file=sys.stderr,
    )
    return result


def compare(args: argparse.Namespace, peers: Sequence[str], rounds: int) -> dict[str, list[dict]]:
    """Results of ours and of the peers, one of each a round, taking turns."""
    results: dict[str, list[dict]] = {name: [] for name in ("ours", *peers)}
    for _ in range(rounds):
        for name in results:
            results[name].append(run(name, args))
    return results


def ratios(ours: Sequence[dict], theirs: Sequence[dict]) -> dict[str, list[float]]:
    """Each of RATIOS pair by pair, where both results have what it needs."""
    found = {}
    for name, ratio in RATIOS.items():
        try:
            found[name] = [ratio(a, b) for a, b in zip(ours, theirs, strict=True)]
        except KeyError:  # TRL does not tell its phases apart
            continue
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def installed_peers() -> list[str]:
    """The peers that can run here."""
    return ["transformers", *(["trl"] if importlib.util.find_spec("trl") else [])]


def measured_pairs() -> None:
    parser = argument_parser("python -m benchmarks.peers", __doc__.split("\n")[0])
    parser.add_argument("--rounds", type=at_least(1), default=3, help="pairs (default: 3)")
    parser.add_argument("--peers", nargs="+", default=installed_peers(), choices=list(MODULES)[1:])
    args = parser.parse_args()
    if missing := set(args.peers) - set(installed_peers()):
        raise InputError(f"{', '.join(missing)} is not installed: pip install -e '.[bench]'")
    with tempfile.TemporaryDirectory() as folder:
        args.checkpoint = str(checkpoint_folder(args.checkpoint, Path(folder)))
        results = compare(args, args.peers, args.rounds)
    for peer in args.peers:
        for name, values in ratios(results["ours"], results[peer]).items():
            print(
                f"{peer} / ours, {name}: {spread(values)}; pairs {', '.join(f'{value:.2f}' for value in values)}"
            )


if __name__ == "__main__":
    sys.exit(program(measured_pairs))
