"""The logs of a run: a progress bar, TensorBoard, and JSON lines files in the run folder."""

import json
import math
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from common.config import Config
from common.errors import InputError, printable
from common.files import read_json_lines
from data import load_image
from grpo.rollout import Rollout
from rewards import LETTERS

from .step import TENSORS, Step
from .watchdog import alarms, recent

_BAR = {
    "reward": "reward",
    "rewards/format": "format",
    "rewards/accuracy": "accuracy",
    "kl": "KL",
    "probability": "p(answer)",
    "tokens_per_second": "tok/s",
}
"""Metric -> its name in the progress bar."""


class RunLog:
    """Writes the logs of a run, from `first_step` on.

    Each step's metrics go to `metrics.jsonl`; each completion, with its rewards and the rules'
    reasons, to `completions.jsonl`; the rest to `incidents.jsonl` and `validation.jsonl`. When a
    run is resumed, rows from after the checkpoint are deleted.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        # Imported here because it takes a second: mistakes in the config are reported first.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(config.run_dir)
        self._rows = recent(self._kept("metrics", first_step))
        self.incidents = Counter(row["kind"] for row in self._kept("incidents", first_step))
        self._kept("completions", first_step)
        self._kept("validation", first_step)
        self._alarms = alarms(self._rows)  # those already reported before the run was resumed
        # When the disk is full, the writer's thread prints a traceback and raises the error again
        # in the main thread. Only the latter is shown, as one line.
        self._hook, threading.excepthook = threading.excepthook, _silent_on_os_errors
        # purge_step: curves, like the files, lose the steps after the checkpoint.
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)

    def step(self, step: Step) -> dict[str, str]:
        """Log a step, and report the watchdog's new alarms.

        Returns the metrics that the progress bar shows, as text.
        """
        metrics = step_metrics(step)
        # JSON has no NaN: values that are not finite become null.
        row = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self._write("metrics", {"step": step.number, **row})
        for name, value in metrics.items():
            tag = name if "/" in name else f"train/{name}"  # TensorBoard groups by prefix
            self.board.add_scalar(tag, value, step.number)
        if step.rollout and step.verdicts_NG:
            self._completions(step, step.rollout)
        self._rows = recent([*self._rows, row])  # as a resumed run will read them
        # A failure that persists raises one alarm, not one per step.
        before, self._alarms = self._alarms, alarms(self._rows)
        for name, line in self._alarms.items():
            if name not in before:
                self.incident(step.number, "watchdog", f"{name}: {line}")
        return {short: f"{metrics[name]:.3g}" for name, short in _BAR.items() if name in metrics}

    def incident(self, step: int, kind: str, line: str) -> None:
        """Report an unusual event: on the terminal, in incidents.jsonl and in TensorBoard."""
        self.incidents[kind] += 1
        tqdm.write(printable(f"step {step}: {line}"))
        self._write("incidents", {"step": step, "kind": kind, "says": line})
        self.board.add_text("incidents", f"    {printable(line)}", step)

    def validation(self, step: int, right: int, total: int) -> None:
        """Log the greedy accuracy on the validation questions after this step."""
        rate = right / total
        self._write("validation", {"step": step, "right": right, "total": total, "accuracy": rate})
        self.board.add_scalar("validation/accuracy", rate, step)
        tqdm.write(f"after {step + 1} steps: validation accuracy {rate:.1%} of {total}")

    def sample(self, step: Step, rollout: Rollout) -> None:
        """Show one group in TensorBoard: its image, question, completions and rewards."""
        question, texts = rollout.prompts[0].question, rollout.texts[0]
        lines = [question.question]
        for letter, option in zip(LETTERS, question.options, strict=False):
            lines.append(f"{letter}) {option}")
        lines += [f"correct: {question.answer}", ""]
        for reward, text in zip(step.tensors["rewards_NG"][0].tolist(), texts, strict=True):
            lines.append(f"[{reward:.2g}] {text}")
        # Four spaces make a code block: the model's text is shown verbatim, never rendered.
        block = "\n".join(lines).replace("\n", "\n    ")
        self.board.add_text("samples", f"    {block}", step.number)
        if question.images:
            try:
                image = np.asarray(load_image(question.images[0]))
                self.board.add_image("samples", image, step.number, dataformats="HWC")
            except InputError as error:  # it was readable when the step began: no reason to stop
                self.incident(step.number, "image", str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        threading.excepthook = self._hook
        try:
            self.board.close()
        except OSError as full:
            full.filename = str(self.folder)
            if kind is None:  # otherwise the error that ended the run is the one to report
                raise

    def _completions(self, step: Step, rollout: Rollout) -> None:
        """Write completions in the format of `evaluation.audits`, plus verdicts and advantages."""
        rewards_NG, advantages_NG = (step.tensors[name].tolist() for name in TENSORS[:2])
        rows = []
        for n, prompt in enumerate(rollout.prompts):
            question = prompt.question
            for g, text in enumerate(rollout.texts[n]):
                rewards = {}
                for verdict in step.verdicts_NG[n][g]:
                    rewards[verdict.rule] = {"score": verdict.score, "why": verdict.why}
                rows.append(
                    {
                        "step": step.number,
                        "id": question.source,
                        "model": "policy",
                        "modality": question.modality,
                        "question_type": question.question_type,
                        "question": question.question,
                        "options": question.options,
                        "ground_truth": question.answer,
                        "completion": text,
                        "rewards": rewards,
                        "reward": rewards_NG[n][g],
                        "advantage": advantages_NG[n][g],
                    }
                )
        self._write("completions", *rows)

    def _write(self, name: str, *rows: dict[str, Any]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(text)

    def _kept(self, name: str, first_step: int) -> list[dict[str, Any]]:
        """Delete a file's rows from `first_step` on, and a last row truncated by a crash.

        Returns the remaining rows; for completions, an empty list.
        """
        file, partial, kept = self.folder / f"{name}.jsonl", self.folder / f"{name}.partial", []
        with partial.open("w", encoding="utf-8") as out:
            for _, row in read_json_lines(file, f"move {file} away") if file.exists() else ():
                if row["step"] < first_step:
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    # Completions are not needed again, and all of them may not fit in memory.
                    if name != "completions":
                        kept.append(row)
        os.replace(partial, file)
        return kept


class SilentLog:
    """The log of a process that leaves logging to another; only its incidents are printed."""

    def __init__(self) -> None:
        self.incidents: Counter[str] = Counter()

    def step(self, step: Step) -> dict[str, str]:
        return {}

    def incident(self, step: int, kind: str, line: str) -> None:
        print(printable(f"step {step}: {line}"), file=sys.__stderr__)

    def validation(self, step: int, right: int, total: int) -> None:
        pass

    def sample(self, step: Step, rollout: Rollout) -> None:
        pass


def step_metrics(step: Step) -> dict[str, float]:
    """The metrics of a step: statistics of its rollout and update, tokens and time."""
    metrics = {name: float(value) for name, value in step.stats.items()}
    seconds = sum(step.seconds.values())
    if step.rollout:
        metrics["tokens"] = step.rollout.mask_NGT.sum().item()
        metrics["tokens_per_second"] = metrics["tokens"] / seconds
    metrics["seconds"] = seconds
    return metrics | {f"seconds/{phase}": spent for phase, spent in step.seconds.items()}


def _silent_on_os_errors(args: threading.ExceptHookArgs) -> None:
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
