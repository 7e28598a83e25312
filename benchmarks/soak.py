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
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "tokens_per_second")
SHORT = {
    "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 24, "train_count": 20, "save_every": 4, "beta": 0.04,
    "learning_rate": 1e-4, "validation_count": 4, "validate_every": 10,
}  # fmt: skip
"""A miniature of the miniature: a step takes a tenth of a second."""


def start(run_dir: Path, steps: int) -> subprocess.Popen:
    """train.py in a process of its own, what it prints in files beside the run's folder."""
    flags = [part for name, value in SHORT.items() for part in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "train.py",
        "--config",
        "configs/miniature.toml",
        "--run_dir",
        str(run_dir),
    ]
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [*command, "--test_questions", "--steps", str(steps), *flags],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def kill_somewhere(process: subprocess.Popen, run_dir: Path, rng: random.Random) -> str:
    """SIGKILL after a random time, or when a checkpoint is being written; returns which, or "" if
    it ended before.
    """
    in_save, saving = rng.random() < 0.4, run_dir / "checkpoints"
    before = _rows(run_dir)
    while process.poll() is None and (
        _rows(run_dir) == before
    ):  # the libraries load for seconds: no news there
        time.sleep(0.01)
    deadline = time.monotonic() + rng.uniform(0, 3)
    while process.poll() is None and (
        not list(saving.glob("*.partial")) if in_save else time.monotonic() < deadline
    ):
        time.sleep(0.0005)
    if process.poll() is not None:
        return ""
    if in_save:
        time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return "in a save" if list(saving.glob("*.partial")) else "between"


def _rows(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def outcome(run_dir: Path) -> dict[str, object]:
    """What must not depend on kills: files by their bytes, metrics without times."""
    kept = sorted((run_dir / "checkpoints").iterdir())
    files = [
        run_dir / name for name in ("completions.jsonl", "validation.jsonl", "incidents.jsonl")
    ]
    files += [
        *(run_dir / "model").iterdir(),
        *(file for folder in kept for file in folder.glob("*.safetensors")),
    ]
    found: dict[str, object] = {str(file.relative_to(run_dir)): file.read_bytes() for file in files}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]]
    found["checkpoints"] = [folder.name for folder in kept]
    found["metrics.jsonl"] = [
        {name: value for name, value in row.items() if name.split("/")[0] not in TIMES}
        for row in rows
    ]
    return found


def soak(kills: int, seed: int, folder: Path) -> list[str]:
    """Run, kill and compare; returns what differs."""
    steps = 4 + 4 * kills  # enough that the run outlives its kills
    alone, killed, rng = folder / "alone", folder / "killed", random.Random(seed)
    if start(alone, steps).wait():
        raise SystemExit(
            f"benchmarks.soak: the run left alone failed:\n{alone.with_suffix('.log').read_text()[-2000:]}"
        )
    where: list[str] = []
    with tqdm(total=kills, desc="kills", unit="kill", dynamic_ncols=True) as bar:
        while len(where) < kills and (place := kill_somewhere(start(killed, steps), killed, rng)):
            where.append(place)
            bar.update()
            bar.set_postfix(steps=_rows(killed))
    if start(killed, steps).wait():
        raise SystemExit(
            f"benchmarks.soak: the killed run failed:\n{killed.with_suffix('.log').read_text()[-2000:]}"
        )
    expected, found = outcome(alone), outcome(killed)
    print(f"{len(where)} kills ({where.count('in a save')} in a save) in a run of {steps} steps")
    return sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--seed", type=int, default=0, help="decides the moments (as far as clocks allow)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the two runs go; a temporary folder by default"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        different = soak(args.kills, args.seed, args.folder or Path(temporary))
    print(
        f"different: {', '.join(different)}"
        if different
        else "all that the run leaves is equal, byte for byte"
    )
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
