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
from importlib.metadata import version
from pathlib import Path

from common.errors import InputError

from .common import FAST_PATHS, argument_parser, at_least, checkpoint_folder, program
from .peers import compare, installed_peers, memory_of, ratios, run, spread

FOLDER = Path(__file__).resolve().parent
MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {
    "step": "seconds a step",
    "memory": "peak memory",
    "rollout": "rollout tokens/s",
    "update": "update",
}


def measure(rounds: int, device: str, file: Path) -> dict:
    """All parts, in turn; `file` holds those that are done."""
    began, results = time.perf_counter(), {"date": date.today().isoformat(), "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(checkpoint_folder("46m", Path(folder)))
        args = argument_parser("", "").parse_args(
            ["--checkpoint", checkpoint, "--steps", "2", "--device", device]
        )
        for side in (448, 224):
            results[f"peers {side}"] = compare(with_(args, side=side), installed_peers(), rounds)
            save(results, file)
        results["groups"] = {group: [] for group in ("4", "16")}
        results["ragged"] = {name: [] for name in ("nothing", "dropping the finished")}
        results["without"] = {
            name: [] for name in ("nothing", *FAST_PATHS) if name != "dropping the finished"
        }
        results["dtypes"] = {dtype: [] for dtype in ("float32", "bfloat16")}
        for _ in range(rounds):
            for group, runs in results["groups"].items():
                runs.append(run("ours", args, group=int(group)))
            for dtype, runs in results["dtypes"].items():
                runs.append(run("ours", args, dtype=dtype))
            for name, runs in results["without"].items():
                runs.append(run("ours", args, without=[name] if name in FAST_PATHS else []))
            for name, runs in results[
                "ragged"
            ].items():  # lengths as of dice: 64 tokens on average, up to 256
                left_out = [name] if name in FAST_PATHS else []
                many = dict(prompts=4, group=16, tokens=256, ending=1 / 64, beta=0, steps=1)
                runs.append(run("ours", args, without=left_out, **many))
        save(results, file)
    results["logprobs"] = {way: logprob_memory(*way.split()) for way in ("", "--full")}
    results["minutes"] = (time.perf_counter() - began) / 60
    results["versions"] = {
        name: version(name) for name in ("torch", "transformers", *installed_peers()[1:])
    }
    save(results, file)
    return results


def with_(args: argparse.Namespace, **changed: object) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | changed)


def save(results: dict, file: Path) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def logprob_memory(*options: str) -> dict:
    """One call of benchmarks/logprob_memory.py."""
    command = [sys.executable, "-m", "benchmarks.logprob_memory", *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def tables(results: dict) -> str:
    """The results in Markdown."""
    first = results["peers 448"]["ours"][0]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{first['machine']}, {first['threads']} threads, {versions}; {results['date']}, {results['minutes']:.0f} minutes "
        f"of measuring. Medians, with the range over the rounds in brackets: {results['rounds']} beside "
        f"peers, {len(results['groups']['4'])} of the rest.",
        "",
    ]
    for side in (448, 224):
        lines += [f"**{side} x {side} pixels**", "", *peer_table(results[f"peers {side}"]), ""]
    lines += [
        "**Where the time goes** (448 x 448, seconds)",
        "",
        *phase_table(results["peers 448"]),
        "",
    ]
    lines += [
        "**What each is worth** (448 x 448): a step without it, its slow twin in its place, over a step with all",
        "",
    ]
    lines += without_table(results["without"]) + [""]
    lines += ["**Other questions**", "", "| | figure |", "|---|---|"]
    groups, dtypes = (
        [by_step(runs) for runs in results[part].values()] for part in ("groups", "dtypes")
    )
    lines += [
        f"| a step's time, G = 16 over G = 4 (replication: 4) | {spread(pairs(groups[1], groups[0]))} |"
    ]
    lines += [f"| a step's time, fp32 over bf16 | {spread(pairs(dtypes[0], dtypes[1]))} |"]
    ragged = [[one["seconds"]["rollout"] for one in runs] for runs in results["ragged"].values()]
    text = "rollout's time if finished completions stay, over ours; 64 completions, 64 tokens on average, at most 256"
    lines += [f"| {text} | {spread(pairs(ragged[1], ragged[0]))} |"]
    ours, full = (results["logprobs"][way]["extra_mb"] for way in ("", "--full"))
    text = f"{ours:,.0f} MB against {full:,.0f} MB: 1/{full / ours:.0f}"
    lines += [
        f"| memory of log-probabilities, 4,096 positions, vocabulary 151,936, against full logits | {text} |"
    ]
    return "\n".join(lines)


def peer_table(results: dict[str, list[dict]]) -> list[str]:
    """Seconds and memory of each, and the ratios to ours."""
    lines = [
        "| | seconds a step | rollout tokens/s | peak MB | "
        + " | ".join(f"{x}, ratio" for x in NAMES.values())
        + " |"
    ]
    lines += ["|---" * (4 + len(NAMES)) + "|"]
    for name, runs in results.items():
        found = ratios(results["ours"], runs) if name != "ours" else {}
        rollout = [
            one["rollout_tokens_per_second"] for one in runs if "rollout_tokens_per_second" in one
        ]
        cells = [spread(by_step(runs)), f"{statistics.median(rollout):.0f}" if rollout else ""]
        cells += [f"{statistics.median(one[memory_of(one)] for one in runs):,.0f}"]
        cells += [spread(found[key]) if key in found else "" for key in NAMES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def phase_table(results: dict[str, list[dict]]) -> list[str]:
    """Median seconds of each phase, of those that tell."""
    told = {
        name: [one["seconds"] for one in runs]
        for name, runs in results.items()
        if "seconds" in runs[0]
    }
    phases = ("rollout", "reference", "update", "optimizer")
    lines = ["| | " + " | ".join(phases) + " |", "|---" * (1 + len(phases)) + "|"]
    for name, seconds in told.items():
        lines.append(
            f"| {name} | "
            + " | ".join(f"{statistics.median(s[p] for s in seconds):.2f}" for p in phases)
            + " |"
        )
    return lines


def without_table(results: dict[str, list[dict]]) -> list[str]:
    """Ratios of time and memory to the runs that leave out nothing."""
    lines = ["| without | seconds a step, ratio | peak memory, ratio |", "|---|---|---|"]
    whole = results["nothing"]
    for name in list(results)[1:]:
        found = ratios(whole, results[name])
        lines.append(f"| {name} | {spread(found['step'], 2)} | {spread(found['memory'], 2)} |")
    return lines


def by_step(runs: Sequence[dict]) -> list[float]:
    return [one["seconds_per_step"] for one in runs]


def pairs(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def around_tables(page: Path) -> tuple[str, str]:
    """What stands on the page before and behind its tables. InputError if it has no marks for
    them.
    """
    try:
        before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
        return before, rest.split(MARKS[1])[1]
    except (OSError, ValueError, IndexError):
        raise InputError(f"{page}: no page with the marks {' and '.join(MARKS)}") from None


def write_tables(results: dict, page: Path) -> None:
    """Put the tables between the marks of the page."""
    before, behind = around_tables(page)
    page.write_text(f"{before}{MARKS[0]}\n{tables(results)}\n{MARKS[1]}{behind}", encoding="utf-8")


def work() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=3,
        help="times that everything is measured (default: 3)",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--results", type=Path, default=FOLDER / "results.json", help="where the figures go"
    )
    parser.add_argument(
        "--page", type=Path, default=FOLDER.parent / "BENCHMARKS.md", help="page with the tables"
    )
    parser.add_argument(
        "--tables-only", action="store_true", help="measure nothing, write the tables anew"
    )
    args = parser.parse_args()
    around_tables(args.page)  # an error now, not after an hour
    if not args.tables_only:
        print(
            f"peers: {', '.join(installed_peers())}; with TRL it takes about an hour on 2 cores",
            file=sys.stderr,
        )
        measure(args.rounds, args.device, args.results)
    write_tables(json.loads(args.results.read_text(encoding="utf-8")), args.page)
    print(f"{args.page} and {args.results} hold the figures")


if __name__ == "__main__":
    sys.exit(program(work))
