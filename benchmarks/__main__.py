"""Measure all figures of BENCHMARKS.md on this machine.

    make bench, or python -m benchmarks [--rounds 3]

Writes benchmarks/results.json after every part, and at the end the tables between the marks in
BENCHMARKS.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import read_json
from common.program import run_program

from .common import FAST_PATHS, argument_parser, at_least, checkpoint_folder
from .peers import compare, installed_peers, median_and_range, memory_of, ratios, run_alone

RESULTS = Path(__file__).resolve().parent / "results.json"
PAGE = RESULTS.parent.parent / "BENCHMARKS.md"
MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"

# Random lengths: 64 tokens on average, at most 256. With equal lengths no completion could leave
# the batch early.
RAGGED: dict[str, Any] = {
    "prompts": 4,
    "group": 16,
    "tokens": 256,
    "ending": 1 / 64,
    "beta": 0,
    "steps": 1,
}
DROPPING = "dropping the finished"

# The arguments that differ from the defaults, by part and name.
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
    """Measure all parts in turn, saving the results after each."""
    began = time.perf_counter()
    results: dict[str, Any] = {"date": date.today().isoformat(), "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(checkpoint_folder("46m", Path(folder)))
        flags = ["--checkpoint", checkpoint, "--steps", "2", "--device", device]
        args = argument_parser("", "").parse_args(flags)
        # One part after the other, so that a failure does not lose the parts before it.
        for part, variants in VARIANTS.items():
            results[part] = compare(args, variants, rounds)
            _save(results)
    blocked, full = run_alone("logprob_memory"), run_alone("logprob_memory", "--full")
    results["logprobs"] = {"": blocked, "--full": full}
    results["minutes"] = (time.perf_counter() - began) / 60
    libraries = "torch", "transformers", *PEERS[2:]
    results["versions"] = {name: version(name) for name in libraries}
    _save(results)


def _save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    environment = Environment(
        loader=FileSystemLoader(RESULTS.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["memory"] = memory_of
    functions = {
        "median": statistics.median,
        "median_and_range": median_and_range,
        "ratios": ratios,
    }
    return environment.get_template("tables.md.jinja").render(functions, results=results)


def write_tables(results: dict[str, Any], page: Path) -> None:
    """Put the tables between the marks of the page."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{tables(results)}\n{MARKS[1]}{after}", encoding="utf-8")


def work() -> None:
    """Run the command line: measure, and write the tables."""
    parser = argparse.ArgumentParser("python -m benchmarks", None, __doc__.split("\n")[0])
    add = parser.add_argument
    add("--rounds", type=partial(at_least, 1), default=3, help="how often to measure everything")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--tables-only", action="store_true", help="only rewrite the tables")
    args = parser.parse_args()
    if not args.tables_only:
        peers = ", ".join(installed_peers())
        print(f"peers: {peers}; with TRL this takes about an hour on 2 cores", file=sys.stderr)
        measure(args.rounds, args.device)
    write_tables(read_json(RESULTS, "measure again, without --tables-only"), PAGE)
    print(f"the figures are in {PAGE} and {RESULTS}")


if __name__ == "__main__":
    sys.exit(run_program("benchmarks", work))
