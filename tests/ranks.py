"""Runs of train.py in several processes, as torchrun starts them, one after another.

Starting Python and torch takes longer than a tiny run, so the same processes do all of them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from socket import socket

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 4


@dataclass
class Command:
    """A run of train.py in `count` processes.

    Attributes:
        flags: for all ranks.
        flags_of: rank (as text) -> flags for that rank alone.
        back_to: before the run, all later checkpoints and the model are deleted.
        signal_in: (rank, step): where SIGTERM arrives during an update.
        bad_steps: of which the loss is not finite.
        killed_in: (rank, step): where a process dies during an update. No command may follow.
    """

    count: int
    config: str
    flags: list[str] = field(default_factory=list)
    flags_of: dict[str, list[str]] = field(default_factory=dict)
    back_to: int | None = None
    signal_in: tuple[int, int] | None = None
    bad_steps: list[int] = field(default_factory=list)
    killed_in: tuple[int, int] | None = None
    port: int = 0


def run_commands(commands: list[Command]) -> list[list[tuple[int, str]]]:
    """For each command and each of its ranks, the exit code and what it wrote to stderr."""
    for command in commands:
        with socket() as free:
            free.bind(("localhost", 0))
            command.port = free.getsockname()[1]
    text = json.dumps([asdict(command) for command in commands])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = []
    for rank in range(max(command.count for command in commands)):
        arguments = [sys.executable, __file__, str(rank), text]
        worker = subprocess.Popen(
            arguments, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        workers.append(worker)
    outputs = [worker.communicate(timeout=300)[0].splitlines() for worker in workers]
    results: list[list[tuple[int, str]]] = [[] for _ in commands]
    for lines in outputs:
        for line in lines:
            number, code, stderr = json.loads(line)
            results[number].append((code, stderr))
    return results


def work(rank: int, commands: list[Command]) -> None:
    """All commands that have this rank, in turn; a line of JSON for each."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from test_train import vowel_score

    import train
    import training.scoring
    from training.run import Run

    torch.set_num_threads(1)
    training.scoring.score = vowel_score
    apply_gradient = Run.apply_gradient
    for number, command in enumerate(commands):
        if rank >= command.count:
            continue

        def disturbed(run, step, stats, command=command):
            if command.signal_in == [rank, step.number]:
                os.kill(os.getpid(), signal.SIGTERM)
            if command.killed_in == [rank, step.number]:
                os._exit(9)
            if step.number in command.bad_steps:
                stats = stats | {"loss": torch.tensor(float("nan"))}
            return apply_gradient(run, step, stats)

        Run.apply_gradient = disturbed
        settings = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(command.port)}
        settings |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(command.count)}
        os.environ |= settings | {"TORCHELASTIC_RUN_ID": "test"}
        if command.count == 1:
            del os.environ["TORCHELASTIC_RUN_ID"]
        if rank == 0 and command.back_to is not None:
            rewind(Path(command.config).parent / "run", command.back_to)
        own = command.flags_of.get(str(rank), [])
        sys.argv = ["train.py", "--config", command.config, *command.flags, *own]
        stdout, sys.stdout = sys.stdout, StringIO()
        with redirect_stderr(StringIO()) as stderr:
            try:
                code = train.main()
            except SystemExit as left:
                code = left.code
        sys.stdout = stdout
        print(json.dumps([number, code, stderr.getvalue()]), flush=True)


def rewind(run: Path, step: int) -> None:
    """The run as it was after `step` steps."""
    with suppress(FileNotFoundError):
        shutil.rmtree(run / "model")
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    work(int(sys.argv[1]), [Command(**one) for one in json.loads(sys.argv[2])])
