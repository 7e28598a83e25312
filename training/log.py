"""What a run tells: a progress bar, TensorBoard, `metrics.jsonl`, `completions.jsonl` and
`incidents.jsonl`.
"""

import json
import math
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.errors import InputError, printable
from data import load_image
from grpo.rollout import StepRecord

from .watchdog import alarms, recent

_BAR = {
    "reward": "reward",
    "rewards/format": "format",
    "rewards/accuracy": "accuracy",
    "kl": "KL",
    "probability": "p(answer)",
    "tokens_per_second": "tok/s",
}


class Stopwatch:
    """Seconds of a step by phase: `laps` by name, and their `total`. A lap waits for the device to
    finish.
    """

    def __init__(self, device: str) -> None:
        self.laps: dict[str, float] = {}
        self._synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on `phase`; laps of one name add up."""
        self._synchronize()
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.laps.values())


class RunLog:
    """Writes a run's record. A resumed run's record loses what came after the checkpoint, and goes
    on from there.
    """

    def __init__(self, run_dir: str | Path, method: str, first_step: int, steps: int) -> None:
        folder = Path(run_dir)
        self.metrics, self._rows = _reopened(folder / "metrics.jsonl", first_step)
        self.completions, _ = _reopened(folder / "completions.jsonl", first_step)
        self.incidents, known = _reopened(folder / "incidents.jsonl", first_step)
        self.validations, _ = _reopened(folder / "validation.jsonl", first_step)
        self.kinds = Counter(str(row.get("kind")) for row in known)
        self._alarms = alarms(recent(self._rows))
        # The writer's thread raises in the caller too; what it prints besides would be a traceback.
        self._hook, threading.excepthook = threading.excepthook, _hide_os_errors
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.bar = tqdm(
            total=steps, initial=first_step, desc=method.upper(), unit="step", dynamic_ncols=True
        )

    def step(self, step: int, that: StepRecord, clock: Stopwatch) -> None:
        """Record a step: its numbers to file, board and bar, every completion with its rewards and
        why to file.

        A verdict has `rule`, `score` and `why`; `that.stats` are the update's scalars.
        """
        tokens = int(that.rollout.mask_NGT.sum())
        metrics = rollout_metrics(that) | {name: float(x) for name, x in that.stats.items()}
        self.record(step, metrics | {"tokens_per_second": tokens / clock.total}, clock)
        for n, prompt in enumerate(that.rollout.prompts):
            for g, text in enumerate(that.rollout.texts[n]):
                rewards = {
                    v.rule: {"score": v.score, "why": v.why} for v in that.verdicts_NGR[n][g]
                }
                row = {
                    "step": step,
                    "question": prompt.question.source,
                    "answer": prompt.question.answer,
                }
                row |= {
                    "completion": text,
                    "rewards": rewards,
                    "advantage": that.advantages_NG[n, g].item(),
                }
                self.completions.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.completions.flush()

    def record(self, step: int, metrics: dict[str, float], clock: Stopwatch) -> None:
        """A step's numbers, to file, board and bar; says what the watchdog finds in them that it
        did not find before.
        """
        metrics = metrics | {"seconds": clock.total}
        metrics |= {f"seconds/{phase}": seconds for phase, seconds in clock.laps.items()}
        self.metrics.write(_json_line(step, metrics))
        self.metrics.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        shown = {short: f"{metrics[name]:.3g}" for name, short in _BAR.items() if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self._rows = recent([*self._rows, metrics])
        before, self._alarms = self._alarms, alarms(self._rows)
        for name, line in self._alarms.items():
            if name not in before:
                self.incident(step, "watchdog", f"{name}: {line}")

    def incident(self, step: int, kind: str, says: str) -> None:
        """Something that whoever slept through it should know: to the terminal and to
        incidents.jsonl, at once.
        """
        self.kinds[kind] += 1
        self.bar.write(printable(f"step {step}: {says}"))
        self.incidents.write(
            json.dumps({"step": step, "kind": kind, "says": says}, ensure_ascii=False) + "\n"
        )
        self.incidents.flush()
        self.board.add_text("incidents", f"    {printable(says)}", step)

    def validation(self, step: int, right: int, total: int) -> None:
        """Greedy accuracy on the validation questions after this step."""
        self.validations.write(
            _json_line(step, {"right": right, "total": total, "accuracy": right / total})
        )
        self.validations.flush()
        self.board.add_scalar("validation/accuracy", right / total, step)
        self.bar.write(
            f"after {step + 1} steps: validation accuracy {right / total:.1%} of {total}"
        )

    def sample(self, step: int, that: StepRecord) -> None:
        """One group for the eye: its image, its question and all of its completions with their
        rewards.
        """
        rollout, rewards_NG, question = (
            that.rollout,
            that.rewards_NG,
            that.rollout.prompts[0].question,
        )
        lines = [
            question.question,
            *(f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", question.options)),
        ]
        lines += [f"correct: {question.answer}", ""]
        lines += [
            f"[{reward:.2g}] {text}"
            for reward, text in zip(rewards_NG[0].tolist(), rollout.texts[0])
        ]
        # Four spaces make a code block: what the model wrote is shown as it is, never rendered.
        self.board.add_text(
            "samples", "\n".join(f"    {line}" for text in lines for line in text.split("\n")), step
        )
        if question.images:
            try:
                self.board.add_image(
                    "samples", np.asarray(load_image(question.images[0])), step, dataformats="HWC"
                )
            except (
                InputError
            ) as error:  # it could be read when the step began; a picture less is no reason to stop
                self.incident(step, "image", str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        threading.excepthook = self._hook
        for file in (self.board, self.metrics, self.completions, self.incidents, self.validations):
            file.close()


def rollout_metrics(that: StepRecord) -> dict[str, float]:
    """What a rollout's rewards and lengths say; means over its completions, or over its groups."""
    rollout, rewards_NG = that.rollout, that.rewards_NG
    lengths = rollout.mask_NGT.sum(-1)
    scores: dict[str, list[float]] = {}
    for verdict in (verdict for group in that.verdicts_NGR for rules in group for verdict in rules):
        scores.setdefault(f"rewards/{verdict.rule}", []).append(verdict.score)
    return {
        "reward": rewards_NG.mean().item(),
        **{name: sum(values) / len(values) for name, values in scores.items()},
        "reward_spread": rewards_NG.std(-1, correction=0).mean().item(),
        "groups_without_spread": (rewards_NG.amax(-1) == rewards_NG.amin(-1)).float().mean().item(),
        "completion_tokens": lengths.float().mean().item(),
        "cut_off": 1 - rollout.ended_NG.float().mean().item(),
    }


def _hide_os_errors(args: threading.ExceptHookArgs) -> None:
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _json_line(step: int, numbers: dict[str, float]) -> str:
    """A row of numbers; what is not finite becomes null, since JSON knows no NaN."""
    row = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return json.dumps({"step": step, **row}) + "\n"


def _reopened(path: Path, first_step: int) -> tuple[Any, list[dict[str, Any]]]:
    """Open for appending, without the rows from `first_step` on and without what a crash has left
    of a row; and those that were kept (for files of short rows: completions are not held).
    """
    partial, rows = path.with_suffix(".partial"), []
    with partial.open("w", encoding="utf-8") as kept:
        # Iterating a file splits at line ends only; str.splitlines would also split at U+2028 in a
        # completion.
        for line in (
            path.open(encoding="utf-8", errors="replace", newline="\n") if path.exists() else ()
        ):
            try:
                row = json.loads(line)
                wanted = line.endswith("\n") and row["step"] < first_step
                if path.stem == "metrics":
                    wanted = wanted and all(
                        isinstance(value, int | float | None) for value in row.values()
                    )
            except (ValueError, KeyError, TypeError, RecursionError):
                wanted = False
            if wanted:
                kept.write(line)
                if path.stem != "completions":
                    rows.append(row)
    os.replace(partial, path)
    return path.open("a", encoding="utf-8"), rows
