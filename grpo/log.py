"""What a run tells: a progress bar, TensorBoard, `metrics.jsonl` and `completions.jsonl`."""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data import load_image

from .batch import Rollout

_BAR = {
    "reward": "reward",
    "rewards/format": "format",
    "rewards/accuracy": "accuracy",
    "kl": "KL",
    "probability": "p(answer)",
    "tokens_per_second": "tok/s",
}


class Stopwatch:
    """Seconds of a step by phase: `laps` by name, and their `total`. A lap waits for the device to finish."""

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
    """Writes a run's record. A resumed run's record loses what came after the checkpoint, and goes on from there."""

    def __init__(self, run_dir: str | Path, method: str, first_step: int, steps: int) -> None:
        folder = Path(run_dir)
        self.metrics = _reopened(folder / "metrics.jsonl", first_step)
        self.completions = _reopened(folder / "completions.jsonl", first_step)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.bar = tqdm(total=steps, initial=first_step, desc=method.upper(), unit="step", dynamic_ncols=True)

    def step(
        self,
        step: int,
        rollout: Rollout,
        verdicts_NGR: Sequence[Sequence[Sequence[Any]]],
        rewards_NG: Tensor,
        advantages_NG: Tensor,
        stats: dict[str, Tensor],
        clock: Stopwatch,
    ) -> None:
        """Record a step: its numbers to file, board and bar, every completion with its rewards and why to file.

        A verdict has `rule`, `score` and `why`; `stats` are the update's scalars.
        """
        tokens = int(rollout.mask_NGT.sum())
        metrics = rollout_metrics(rollout, verdicts_NGR, rewards_NG) | {name: float(x) for name, x in stats.items()}
        metrics |= {"seconds": clock.total, "tokens_per_second": tokens / clock.total}
        metrics |= {f"seconds/{phase}": seconds for phase, seconds in clock.laps.items()}
        self.record(step, metrics)
        for n, prompt in enumerate(rollout.prompts):
            for g, text in enumerate(rollout.texts[n]):
                rewards = {v.rule: {"score": v.score, "why": v.why} for v in verdicts_NGR[n][g]}
                row = {"step": step, "question": prompt.question.source, "answer": prompt.question.answer}
                row |= {"completion": text, "rewards": rewards, "advantage": advantages_NG[n, g].item()}
                self.completions.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.completions.flush()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """A step's numbers, to file, board and bar; "grad_norm" among them."""
        if not math.isfinite(metrics["grad_norm"]):
            self.bar.write(f"step {step}: the gradient is not finite, and the update is left out")
        self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self.metrics.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        shown = {short: f"{metrics[name]:.3g}" for name, short in _BAR.items() if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def sample(self, step: int, rollout: Rollout, rewards_NG: Tensor) -> None:
        """One group for the eye: its image, its question and all of its completions with their rewards."""
        question = rollout.prompts[0].question
        lines = [question.question, *(f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", question.options))]
        lines += [f"correct: {question.answer}", ""]
        lines += [f"[{reward:.2g}] {text}" for reward, text in zip(rewards_NG[0].tolist(), rollout.texts[0])]
        # Four spaces make a code block: what the model wrote is shown as it is, never rendered.
        self.board.add_text("samples", "\n".join(f"    {line}" for text in lines for line in text.split("\n")), step)
        if question.images:
            self.board.add_image("samples", np.asarray(load_image(question.images[0])), step, dataformats="HWC")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.board.close()
        self.metrics.close()
        self.completions.close()


def rollout_metrics(
    rollout: Rollout, verdicts_NGR: Sequence[Sequence[Sequence[Any]]], rewards_NG: Tensor
) -> dict[str, float]:
    """What a rollout's rewards and lengths say; means over its completions, or over its groups."""
    lengths = rollout.mask_NGT.sum(-1)
    scores: dict[str, list[float]] = {}
    for verdict in (verdict for group in verdicts_NGR for rules in group for verdict in rules):
        scores.setdefault(f"rewards/{verdict.rule}", []).append(verdict.score)
    return {
        "reward": rewards_NG.mean().item(),
        **{name: sum(values) / len(values) for name, values in scores.items()},
        "reward_spread": rewards_NG.std(-1, correction=0).mean().item(),
        "groups_without_spread": (rewards_NG.amax(-1) == rewards_NG.amin(-1)).float().mean().item(),
        "completion_tokens": lengths.float().mean().item(),
        "cut_off": 1 - rollout.ended_NG.float().mean().item(),
    }


def _reopened(path: Path, first_step: int) -> Any:
    """Open for appending, without the rows from `first_step` on and without what a crash has left of a row."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as kept:
        # Iterating a file splits at line ends only; str.splitlines would also split at U+2028 in a completion.
        for row in path.open(encoding="utf-8", errors="replace", newline="\n") if path.exists() else ():
            try:
                wanted = row.endswith("\n") and json.loads(row)["step"] < first_step
            except (ValueError, KeyError, TypeError):
                wanted = False
            if wanted:
                kept.write(row)
    os.replace(partial, path)
    return path.open("a", encoding="utf-8")
