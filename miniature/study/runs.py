"""The study's runs: train.py in processes of their own, two at a time, each on one core.

What is finished is not done again, and a run that was stopped goes on from its checkpoint: the
folder of each run says how far it has come.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.config import load_config
from common.errors import InputError
from common.files import read_json_lines
from data import read_questions
from evaluation.answers import load_examinee
from rewards import read_letter

from .arms import ARMS, BASES, BY_FOLDER, LENGTHS, RATES, SHIPPED, TEST, TRIAL_SEED, Arm, Base

REMEDY = "delete it, and `make study` makes it anew"
CURVE_EVERY = 10  # steps between the points of a run's curve
ONE_CORE = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Two runs side by side on a core each take less time than one after the other on two."""


class Choice(NamedTuple):
    """The settings of an arm, and the trial that speaks for them: right of how many."""

    rate: str
    steps: int
    right: int
    total: int


class Command(NamedTuple):
    """A program to be run; its output goes to `log`."""

    arguments: tuple[str, ...]
    log: Path

    def work(self) -> None:
        """InputError, with the last line of the output, if the program fails."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            command = [sys.executable, *self.arguments]
            done = subprocess.run(command, env=ONE_CORE, stdout=log, stderr=log, check=False)
        if done.returncode:
            lines = self.log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            raise InputError(f"{' '.join(self.arguments)}: {last} (see {self.log})")


class Answering(NamedTuple):
    """Greedy answers of a model to all test questions, one JSON line each."""

    model: Path
    file: Path

    def work(self) -> None:
        config = load_config(ARMS[0].config)  # all have the same limits and pixels
        questions = read_questions(TEST)
        examinee = load_examinee(self.model, config)
        rows = [""] * len(questions)
        for place, (answer,) in examinee.answers(questions, str(self.file), range(len(questions))):
            question = questions[place]
            row = {
                "id": question.source,
                "modality": question.modality,
                "question_type": question.question_type,
                "options": question.options,
                "ground_truth": question.answer,
                "completion": answer.text,
                "letter": read_letter(answer.text),
            }
            rows[place] = json.dumps(row) + "\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(rows))
        partial.replace(self.file)  # whole or not at all


Job = Command | Answering


def _work(job: Job) -> None:
    job.work()


def do(name: str, jobs: Sequence[Job]) -> None:
    """Two at a time; the first that fails ends the study, and the others are not begun."""
    # Spawned: a forked child of a process that has used torch's threads may hang.
    pool = ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,))
    futures = [pool.submit(_work, job) for job in jobs]
    try:
        for future in tqdm(as_completed(futures), name, len(futures), unit="job"):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class Study:
    """All folders and jobs below `root`. A job that is done is not among the jobs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, base: Base) -> Path:
        return Path("miniature/base") if base == SHIPPED else self.root / "bases" / base.name

    def run_dir(self, base: Base, arm: Arm, seed: int) -> Path:
        return self.root / base.name / arm.folder / str(seed)

    def trial_dir(self, arm: Arm, rate: str) -> Path:
        return self.root / "trials" / arm.folder / rate

    def answer_files(self, base: Base, arm: Arm | None) -> list[Path]:
        """The answers of an arm, a file for each seed; for None those of the base itself."""
        if arm is None:
            return [self.root / base.name / "answers.jsonl"]
        return [self.run_dir(base, arm, seed) / "answers.jsonl" for seed in base.seeds]

    def trials(self, arms: Sequence[Arm]) -> list[Job]:
        """Each arm at each rate, validated at each length on the way; on the shipped base."""
        jobs: list[Job] = []
        for arm in arms:
            begin = self.base(SHIPPED)
            if arm.begins_with:  # the checkpoint of the best trial of that arm
                chosen = self.choice(BY_FOLDER[arm.begins_with])
                begin = self.trial_dir(BY_FOLDER[arm.begins_with], chosen.rate)
                begin = begin / "checkpoints" / f"step-{chosen.steps:06d}"
            for rate in RATES:
                folder = self.trial_dir(arm, rate)
                jobs += _training(arm, begin, folder, rate, max(LENGTHS), TRIAL_SEED)
        return jobs

    def choice(self, arm: Arm) -> Choice:
        """The trial with the most validation questions right; of equals the shorter one, then
        that of the lower rate.
        """
        choices = []
        for steps in LENGTHS:
            for rate in RATES:
                right, total = self.validated(self.trial_dir(arm, rate))[steps]
                choices.append(Choice(rate, steps, right, total))
        return max(choices, key=attrgetter("right"))  # of equals the first

    def validated(self, run_dir: Path) -> dict[int, tuple[int, int]]:
        """By steps done: how many validation questions were right, of how many."""
        rows = [row for _, row in read_json_lines(run_dir / "validation.jsonl", REMEDY)]
        return {row["step"] + 1: (row["right"], row["total"]) for row in rows}

    def bases(self) -> list[Job]:
        jobs: list[Job] = []
        for base in BASES[1:]:
            folder = self.base(base)
            if not (folder / "README.md").exists():  # the card is written last
                arguments = ("-m", "miniature.base", "--out", str(folder), "--seed", str(base.seed))
                jobs.append(Command(arguments, folder.with_suffix(".log")))
        return jobs

    def runs(self, base: Base, arms: Sequence[Arm]) -> list[Job]:
        """Each arm with its chosen settings and each seed, on one base."""
        jobs: list[Job] = []
        for arm in arms:
            chosen = self.choice(arm)
            for seed in base.seeds:
                begin = self.base(base)
                if arm.begins_with:
                    begin = self.run_dir(base, BY_FOLDER[arm.begins_with], seed) / "model"
                folder = self.run_dir(base, arm, seed)
                jobs += _training(arm, begin, folder, chosen.rate, chosen.steps, seed)
        return jobs

    def answers(self) -> list[Job]:
        """Every model of the study, the bases included."""
        jobs: list[Job] = []
        for base in BASES:
            (file,) = self.answer_files(base, None)
            pairs = [(self.base(base), file)]
            for arm in ARMS:
                for file in self.answer_files(base, arm):
                    pairs.append((file.parent / "model", file))
            jobs += [Answering(model, file) for model, file in pairs if not file.exists()]
        return jobs


def _training(
    arm: Arm, begin: Path, folder: Path, rate: str, steps: int, seed: int
) -> list[Command]:
    """One run of train.py, unless it is finished."""
    if (folder / "summary.json").exists():
        return []
    flags = ["--model", str(begin), "--run_dir", str(folder), "--learning_rate", rate]
    flags += ["--steps", str(steps), "--seed", str(seed), "--test_questions"]
    if seed == TRIAL_SEED:  # validated at each length, and kept: another arm may begin there
        flags += ["--validate_every", str(LENGTHS[0]), "--keep_checkpoints", str(len(LENGTHS))]
    else:
        flags += ["--validate_every", str(CURVE_EVERY)]
    command = ("train.py", "--config", arm.config, *arm.flags, *flags)
    return [Command(command, Path(f"{folder}.log"))]
