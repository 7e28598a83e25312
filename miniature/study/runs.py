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
from itertools import chain, product
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from common.config import load_config
from common.errors import InputError
from common.files import read_json_lines
from data import read_questions
from evaluation.answers import load_examinee
from rewards import read_letter

from .arms import ARMS, BASES, LENGTHS, RATES, SHIPPED, TEST, TRIAL_SEED, Arm, Base

REMEDY = "delete it, and `make study` makes it anew"
ANSWERS = "answers.jsonl"
CURVE_EVERY = 10  # steps between the points of a run's curve
ONE_CORE = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Two runs side by side on a core each take less time than one after the other on two."""

Rows = list[dict[str, Any]]
"""The answers of one model to the test questions."""


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
            *_, last = self.log.read_text(errors="replace").strip().split("\n")
            raise InputError(f"{' '.join(self.arguments)}: {last} (see {self.log})")


class Answering(NamedTuple):
    """Greedy answers of a model to all test questions, one JSON line each."""

    model: Path
    file: Path

    def work(self) -> None:
        config = load_config(ARMS[0].config)  # all have the same limits and pixels
        questions = read_questions(TEST)
        examinee = load_examinee(self.model, config)
        texts = examinee.greedy_texts(questions, str(self.file))
        lines = []
        for question, text in zip(questions, texts, strict=True):
            row = {
                "id": question.source,
                "modality": question.modality,
                "question_type": question.question_type,
                "options": question.options,
                "ground_truth": question.answer,
                "completion": text,
                "letter": read_letter(text),
            }
            lines.append(json.dumps(row) + "\n")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(lines))
        partial.replace(self.file)  # whole or not at all

    def rows(self) -> Rows:
        return [row for _, row in read_json_lines(self.file, REMEDY)]


def do(name: str, jobs: Sequence[Command | Answering]) -> None:
    """Two at a time; the first that fails ends the study, and the others are not begun."""
    # Spawned: a forked child of a process that has used torch's threads may hang.
    pool = ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,))
    futures = [pool.submit(job.work) for job in jobs]
    try:
        for future in tqdm(as_completed(futures), name, len(futures), unit="job"):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def validated(run_dir: Path) -> dict[int, tuple[int, int]]:
    """By steps done: how many validation questions were right, of how many."""
    rows = read_json_lines(run_dir / "validation.jsonl", REMEDY)
    return {row["step"] + 1: (row["right"], row["total"]) for _, row in rows}


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

    def trials(self, arms: Sequence[Arm]) -> list[Command]:
        """Each arm at each rate, validated at each length on the way; on the shipped base."""
        jobs = []
        for arm in arms:
            begin = self.base(SHIPPED)
            if arm.begins_with:
                chosen = self.choice(arm.begins_with)
                trial = self.trial_dir(arm.begins_with, chosen.rate)
                begin = trial / "checkpoints" / f"step-{chosen.steps:06d}"
            for rate in RATES:
                flags = _flags(arm, begin, rate, max(LENGTHS), TRIAL_SEED, LENGTHS[0])
                # The checkpoints of all lengths: another arm may begin there.
                flags += ["--keep_checkpoints", str(len(LENGTHS))]
                jobs += training(self.trial_dir(arm, rate), flags)
        return jobs

    def choice(self, arm: Arm) -> Choice:
        """The trial with the most validation questions right; of equals the shorter one, then
        that of the lower rate.
        """
        choices = []
        for steps, rate in product(LENGTHS, RATES):
            right, total = validated(self.trial_dir(arm, rate))[steps]
            choices.append(Choice(rate, steps, right, total))
        return max(choices, key=attrgetter("right"))  # of equals the first

    def bases(self) -> list[Command]:
        jobs = []
        for base in BASES[1:]:
            folder = self.base(base)
            if not (folder / "README.md").exists():  # the card is written last
                arguments = ("-m", "miniature.base", "--out", str(folder), "--seed", str(base.seed))
                jobs.append(Command(arguments, folder.with_suffix(".log")))
        return jobs

    def runs(self, base: Base, arms: Sequence[Arm]) -> list[Command]:
        """Each arm with its chosen settings and each seed, on one base."""
        jobs = []
        for arm in arms:
            chosen = self.choice(arm)
            for seed in base.seeds:
                begin = self.base(base)
                if arm.begins_with:
                    begin = self.run_dir(base, arm.begins_with, seed) / "model"
                flags = _flags(arm, begin, chosen.rate, chosen.steps, seed, CURVE_EVERY)
                jobs += training(self.run_dir(base, arm, seed), flags)
        return jobs

    def examined(self, base: Base) -> dict[str, list[Answering]]:
        """The base itself, and then each arm with a model for each seed, by their names."""
        models = {"the base": [Answering(self.base(base), self.root / base.name / ANSWERS)]}
        for arm in ARMS:
            folders = [self.run_dir(base, arm, seed) for seed in base.seeds]
            models[arm.name] = [Answering(one / "model", one / ANSWERS) for one in folders]
        return models

    def answers(self) -> list[Answering]:
        """Every model of the study, the bases included."""
        jobs: list[Answering] = []
        for base in BASES:
            jobs += chain.from_iterable(self.examined(base).values())
        return [job for job in jobs if not job.file.exists()]


def _flags(arm: Arm, begin: Path, rate: str, steps: int, seed: int, every: int) -> list[str]:
    flags = ["--config", arm.config, *arm.flags, "--model", str(begin), "--learning_rate", rate]
    flags += ["--steps", str(steps), "--seed", str(seed), "--validate_every", str(every)]
    return flags


def training(folder: Path, flags: Sequence[str]) -> list[Command]:
    """A run of train.py without a test, unless it is finished."""
    if (folder / "summary.json").exists():
        return []
    command = ("train.py", *flags, "--run_dir", str(folder), "--test_questions")
    return [Command(command, Path(f"{folder}.log"))]
