"""All figures of BENCHMARKS.md, measured on this machine: `make bench`, or `python -m benchmarks
[--rounds 3]`.

Writes benchmarks/results.json after every part, and the tables between the marks in BENCHMARKS.md
at the end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.files import read_json
from common.program import run_program

from .common import FAST_PATHS, argument_parser, at_least, checkpoint_folder
from .peers import Result, compare, installed_peers, median_and_range, memory_of, ratios

RESULTS = Path(__file__).resolve().parent / "results.json"
PAGE = RESULTS.parent.parent / "BENCHMARKS.md"
MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"
RATIOS = {
    "step": "seconds a step, ratio",
    "memory": "peak memory, ratio",
    "rollout": "rollout tokens/s, ratio",
    "update": "update, ratio",
}
PHASES = "rollout", "reference", "update", "optimizer"

# Lengths as of dice: 64 tokens on average, up to 256. Where completions end alike, none can leave.
RAGGED: dict[str, Any] = {
    "prompts": 4,
    "group": 16,
    "tokens": 256,
    "ending": 1 / 64,
    "beta": 0,
    "steps": 1,
}
DROPPING = "dropping the finished"

# What is measured: by part and name, the arguments that differ.
PEERS = "ours", *installed_peers()
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "peers 448": {name: {} for name in PEERS},
    "peers 224": {name: {"side": 224} for name in PEERS},
    "groups": {"4": {"group": 4}, "16": {"group": 16}},
    "ragged": {"nothing": RAGGED, DROPPING: RAGGED | {"without": [DROPPING]}},
    "without": {"nothing": {}} | {x: {"without": [x]} for x in FAST_PATHS if x != DROPPING},
    "dtypes": {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}},
}


def measure(rounds: int, device: str) -> None:
    """All parts, in turn; the file of results holds those that are done."""
    began = time.perf_counter()
    results: dict[str, Any] = {"date": date.today().isoformat(), "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(checkpoint_folder("46m", Path(folder)))
        flags = ["--checkpoint", checkpoint, "--steps", "2", "--device", device]
        args = argument_parser("", "").parse_args(flags)
        # One part after the other, so that an hour of measuring survives the failure of the next.
        for part, variants in VARIANTS.items():
            results[part] = compare(args, variants, rounds)
            _save(results)
    results["logprobs"] = {"": _logprob_memory(), "--full": _logprob_memory("--full")}
    results["minutes"] = (time.perf_counter() - began) / 60
    libraries = "torch", "transformers", *PEERS[2:]
    results["versions"] = {name: version(name) for name in libraries}
    _save(results)


def _save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _logprob_memory(*options: str) -> Result:
    command = [sys.executable, "-m", "benchmarks.logprob_memory", *options]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def tables(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    ours = results["peers 448"]["ours"][0]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{ours['machine']}, {ours['threads']} threads, {versions}; {results['date']}, "
        f"{results['minutes']:.0f} minutes of measuring. Medians, with the range over the rounds "
        f"in brackets: {results['rounds']} beside peers, {len(results['groups']['4'])} of the rest."
    ]
    for side in (448, 224):
        lines += ["", f"**{side} x {side} pixels**", "", *_peer_table(results[f"peers {side}"])]
    lines += ["", "**Where the time goes** (448 x 448, seconds)", ""]
    lines += _phase_table(results["peers 448"])
    lines += [
        "",
        "**What each is worth** (448 x 448): a step without it, its slow twin in its place, over a "
        "step with all",
        "",
        *_without_table(results["without"]),
    ]
    return "\n".join([*lines, "", "**Other questions**", "", *_other_table(results)])


def _table(*rows: Sequence[str]) -> list[str]:
    """Lines of Markdown; the first row is the head, and its first cell is empty."""
    # Only in the head: pages that are there already have it so.
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return [head.replace("|  |", "| |", 1), "|---" * len(rows[0]) + "|", *lines]


def _peer_table(results: dict[str, list[Result]]) -> list[str]:
    """Seconds and memory of each, and the ratios to ours."""
    rows = [["", "seconds a step", "rollout tokens/s", "peak MB", *RATIOS.values()]]
    for name, runs in results.items():
        rates = [one.get("rollout_tokens_per_second", 0.0) for one in runs]
        rate, memory = statistics.median(rates), statistics.median(map(memory_of, runs))
        better = ratios(results["ours"], runs) if name != "ours" else {}
        cells = [median_and_range(better[key]) if key in better else "" for key in RATIOS]
        step = median_and_range([one["seconds_per_step"] for one in runs])
        rows.append([name, step, f"{rate:.0f}" if rate else "", f"{memory:,.0f}", *cells])
    return _table(*rows)


def _phase_table(results: dict[str, list[Result]]) -> list[str]:
    """Median seconds of each phase, of those that time them."""
    rows = [["", *PHASES]]
    for name, runs in results.items():
        if "seconds" in runs[0]:
            medians = (statistics.median(one["seconds"][key] for one in runs) for key in PHASES)
            rows.append([name, *(f"{median:.2f}" for median in medians)])
    return _table(*rows)


def _without_table(results: dict[str, list[Result]]) -> list[str]:
    """Ratios of time and memory to the runs that leave out nothing."""
    rows = [["without", RATIOS["step"], RATIOS["memory"]]]
    for name in [name for name in results if name != "nothing"]:
        worse = ratios(results["nothing"], results[name])
        rows.append(
            [name, median_and_range(worse["step"], 2), median_and_range(worse["memory"], 2)]
        )
    return _table(*rows)


def _other_table(results: dict[str, Any]) -> list[str]:
    groups, dtypes, ragged = results["groups"], results["dtypes"], results["ragged"]
    replication, dtype = ratios(groups["4"], groups["16"]), ratios(*reversed(dtypes.values()))
    dropping = ratios(ragged["nothing"], ragged[DROPPING])
    ours, full = (results["logprobs"][way]["extra_mb"] for way in ("", "--full"))
    rows = {
        "": "figure",
        "a step's time, G = 16 over G = 4 (replication: 4)": median_and_range(replication["step"]),
        "a step's time, fp32 over bf16": median_and_range(dtype["step"]),
        "rollout's time if finished completions stay, over ours; 64 completions, 64 tokens on "
        "average, at most 256": median_and_range(dropping["rollout"]),
        "memory of log-probabilities, 4,096 positions, vocabulary 151,936, against full logits": (
            f"{ours:,.0f} MB against {full:,.0f} MB: 1/{full / ours:.0f}"
        ),
    }
    return _table(*rows.items())


def write_tables(results: dict[str, Any], page: Path) -> None:
    """Put the tables between the marks of the page."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    behind = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{tables(results)}\n{MARKS[1]}{behind}", encoding="utf-8")


def work() -> None:
    """Measure and write as the command line says."""
    parser = argparse.ArgumentParser("python -m benchmarks", None, __doc__.split("\n")[0])
    add = parser.add_argument
    add("--rounds", type=partial(at_least, 1), default=3, help="how often all is measured")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--tables-only", action="store_true", help="measure nothing, write the tables anew")
    args = parser.parse_args()
    if not args.tables_only:
        peers = ", ".join(installed_peers())
        print(f"peers: {peers}; with TRL it takes about an hour on 2 cores", file=sys.stderr)
        measure(args.rounds, args.device)
    write_tables(read_json(RESULTS, "measure anew, without --tables-only"), PAGE)
    print(f"{PAGE} and {RESULTS} hold the figures")


if __name__ == "__main__":
    sys.exit(run_program("benchmarks", work))
