"""A long run leaks neither memory nor open files."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from test_train import vowel_score
from tiny_run import write_run

import train
from training.run import Run

STEPS, SETTLED = 500, 150
"""After SETTLED steps, the libraries are loaded, the allocator has its arenas, and a checkpoint has
been saved.
"""


def held() -> tuple[float, int]:
    """Resident memory in MB, and the number of open files (without sockets and pipes, which servers
    of other tests may still hold).
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    links = []
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since it was listed
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
    return pages * os.sysconf("SC_PAGESIZE") / 1e6, sum(link.startswith("/") for link in links)


def test_memory_and_open_files_stay_flat_over_500_steps(tmp_path, monkeypatch):
    original, held_after = Run._end, {}

    def watched(run, step):
        original(run, step)
        if step.number >= SETTLED:
            held_after[step.number] = held()

    monkeypatch.setattr("training.scoring.score", vowel_score)
    monkeypatch.setattr(Run, "_end", watched)
    config = write_run(
        tmp_path,
        steps=STEPS,
        prompts_per_step=1,
        group_size=2,
        max_new_tokens=6,
        save_every=50,
        test_questions=[],
        validation_fraction=0.3,
        validate_every=100,
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    assert train.main() == 0
    quarter = (STEPS - SETTLED) // 4
    memory, files = ([x[i] for x in held_after.values()] for i in (0, 1))
    first, last = sorted(memory[:quarter])[quarter // 2], sorted(memory[-quarter:])[quarter // 2]
    megabytes = f"{first:.1f} MB after {SETTLED} steps, {last:.1f} MB after {STEPS}"
    print(f"{megabytes}; at most {max(files)} files open")
    # MB. Leaking one completion's text per step would stay below this limit; leaking one weight
    # tensor per step would exceed it 40 times.
    assert last - first < 4
    assert max(files) - min(files) <= 3  # files of a checkpoint that is being saved
