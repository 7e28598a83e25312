"""Kill a short run of the miniature at random moments until it is done: its end must be that of a
run left alone.

    python -m benchmarks.soak --kills 20 [--seed 0] [--folder DIR]

SIGKILL, some of them in the middle of saving a checkpoint. Compared at the end, byte for byte: the
model, the tensors of the checkpoints that are kept, completions, validations and incidents, and the
metrics without their times. Exit code 0 if all are equal.
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
# A miniature of the miniature: a step takes a tenth of a second.
SHORT = """--prompts_per_step 2 --group_size 4 --max_new_tokens 24 --train_count 20 --save_every 4
    --beta 0.04 --learning_rate 1e-4 --validation_count 4 --validate_every 10 --test_questions"""
CLOCKS = "seconds", "tokens_per_second"  # how the names of metrics begin that are of time


def start(run_dir: Path, steps: int) -> subprocess.Popen:
    """train.py in a process of its own; what it prints goes to a file beside the run's folder."""
    command = [sys.executable, "train.py", "--config", "configs/miniature.toml", *SHORT.split()]
    command += ["--run_dir", str(run_dir), "--steps", str(steps)]
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(run_dir: Path, steps: int) -> None:
    """Let a run come to its end. InputError if it fails."""
    if start(run_dir, steps).wait():
        log = run_dir.with_suffix(".log")
        raise InputError(f"the run failed; its last words, in {log}: {log.read_text()[-500:]}")


def kill_somewhere(process: subprocess.Popen, run_dir: Path, rng: random.Random) -> str:
    """SIGKILL after a random time, or when a checkpoint is being written; returns which, or "" if
    it ended before.
    """
    # Saves are short: left to chance alone, a kill would hardly ever meet one.
    in_save, rows = rng.random() < 0.4, _rows(run_dir)
    # The libraries load for seconds, in which nothing can go wrong: the time runs from the first
    # step on.
    while process.poll() is None and _rows(run_dir) == rows:
        time.sleep(0.01)
    deadline = time.monotonic() + rng.uniform(0, 3)
    while process.poll() is None:
        if _is_saving(run_dir) if in_save else time.monotonic() > deadline:
            # Not always at the first file of a save.
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
    """What must not depend on kills: files by their bytes, metrics without times."""
    contents: dict[str, object] = {}
    for pattern in ("*s.jsonl", "validation.jsonl", "model/*", "checkpoints/*/*.safetensors"):
        for file in run_dir.glob(pattern):
            contents[str(file.relative_to(run_dir))] = file.read_bytes()
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        # Clocks differ from run to run; all else must not.
        rows.append({name: row[name] for name in row if not name.startswith(CLOCKS)})
    contents["metrics.jsonl"] = rows
    return contents


def soak(kills: int, seed: int, folder: Path) -> list[str]:
    """Run, kill and compare; returns what differs."""
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
    """Soak as the command line says, and print what differs."""
    parser = argparse.ArgumentParser("python -m benchmarks.soak")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments, as clocks allow")
    parser.add_argument("--folder", type=Path, help="of the two runs; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        different = soak(args.kills, args.seed, args.folder or Path(temporary))
    if different:
        sys.exit(f"different: {', '.join(different)}")
    print("all that the run leaves is equal, byte for byte")


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.soak", work))
