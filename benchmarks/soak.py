"""Kill a short run of the miniature at random moments, and compare it with an undisturbed run.

    python -m benchmarks.soak --kills 20 [--seed 0] [--folder DIR]

The kills are SIGKILL, some of them in the middle of saving a checkpoint. At the end, both runs must
agree byte for byte in the model, the tensors of the kept checkpoints, completions, validations and
incidents, and in the metrics without times. Exit code 0 if they do.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from common.errors import InputError
from common.program import run_program

ROOT = Path(__file__).resolve().parent.parent
# A smaller version of the miniature run: a step takes a tenth of a second.
SHORT = """--prompts_per_step 2 --group_size 4 --max_new_tokens 24 --train_count 20 --save_every 4
    --beta 0.04 --learning_rate 1e-4 --validation_count 4 --validate_every 10 --test_questions"""
CLOCKS = "seconds", "tokens_per_second"  # prefixes of the names of metrics that measure time


def start(run_dir: Path, steps: int) -> subprocess.Popen:
    """Start train.py in a process of its own; its output goes to a file beside the run folder."""
    command = [sys.executable, "train.py", "--config", "configs/miniature.toml", *SHORT.split()]
    command += ["--run_dir", str(run_dir), "--steps", str(steps)]
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(run_dir: Path, steps: int) -> None:
    """Run train.py to the end. InputError if it fails."""
    if start(run_dir, steps).wait():
        log = run_dir.with_suffix(".log")
        raise InputError(f"the run failed; the end of {log}: {log.read_text()[-500:]}")


def kill_somewhere(process: subprocess.Popen, run_dir: Path, rng: random.Random) -> str:
    """Send SIGKILL after a random time, or while a checkpoint is being written.

    Returns "in a save" or "between", or "" if the run ended first.
    """
    # Saves are short: by chance alone, a kill would hardly ever hit one.
    in_save, rows = rng.random() < 0.4, _rows(run_dir)
    # Libraries take seconds to load, when nothing can go wrong: start the clock at the first step.
    while process.poll() is None and _rows(run_dir) == rows:
        time.sleep(0.01)
    deadline = time.monotonic() + rng.uniform(0, 3)
    while process.poll() is None:
        if _is_saving(run_dir) if in_save else time.monotonic() > deadline:
            # Vary the delay, so that a kill does not always hit the first file of a save.
            time.sleep(rng.uniform(0, 0.02) if in_save else 0)
            process.kill()
            process.wait()
            return "in a save" if _is_saving(run_dir) else "between"
        time.sleep(0.0005)
    return ""


def _is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.partial"))


def _rows(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def outcome(run_dir: Path) -> dict[str, object]:
    """All that must not depend on kills: the bytes of files, and metrics without times."""
    contents: dict[str, object] = {}
    for pattern in ("*s.jsonl", "validation.jsonl", "model/*", "checkpoints/*/*.safetensors"):
        for file in run_dir.glob(pattern):
            contents[str(file.relative_to(run_dir))] = file.read_bytes()
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        # Only times may differ from run to run.
        rows.append({name: row[name] for name in row if not name.startswith(CLOCKS)})
    contents["metrics.jsonl"] = rows
    return contents


def soak(kills: int, seed: int, folder: Path) -> list[str]:
    """Run, kill and compare. Returns the names of the files that differ."""
    steps = 4 + 4 * kills  # enough that the run outlives its kills
    alone, killed, rng = folder / "alone", folder / "killed", random.Random(seed)
    finish(alone, steps)
    places = []
    for _ in tqdm(range(kills), "kills", dynamic_ncols=True):
        places.append(kill_somewhere(start(killed, steps), killed, rng))
    finish(killed, steps)
    in_saves = places.count("in a save")
    print(f"{kills - places.count('')} kills ({in_saves} in a save) in a run of {steps} steps")
    expected, actual = outcome(alone), outcome(killed)
    names = expected.keys() | actual.keys()
    return sorted(name for name in names if expected.get(name) != actual.get(name))


def work() -> None:
    """Run the command line, and print the names of the files that differ."""
    parser = argparse.ArgumentParser("python -m benchmarks.soak")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="determines the moments, up to timing")
    parser.add_argument("--folder", type=Path, help="for the two runs; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        different = soak(args.kills, args.seed, args.folder or Path(temporary))
    if different:
        sys.exit(f"different: {', '.join(different)}")
    print("the files of both runs are equal, byte for byte")


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.soak", work))
