"""The command-line program: parses the config, trains, and measures accuracy before and after."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

from common.command_line import parse_arguments
from common.config import Config
from common.program import run_program
from common.terminal import patient_output
from evaluation.accuracy import accuracy_by_modality, comparison_table, run_summary
from evaluation.audits.blind import blind_credits, by_modality
from evaluation.statistics import percent, percent_with_interval
from model import save_model

from .parallel import joined_ranks
from .prepare import prepared
from .run import Run, saving_at_the_end
from .sft import fine_tune
from .stop import SIGNALS, stop_at_once

Method = Callable[[Run, Config], None]


def launch(description: str, grpo: Method, dry_run: Callable[[Config], None]) -> int:
    """Run train.py's command line, and return the exit code.

    0: done; 2: an error that the user can fix, printed in one line; 130, 143 or 129: stopped by
    Ctrl-C, SIGTERM or SIGHUP, with a checkpoint of the last finished step.
    """
    for number in SIGNALS:
        # nohup sets SIGHUP to be ignored, so that the run outlives its terminal. Shells do the
        # same with SIGINT for background jobs, but a SIGINT sent to a run is meant for it.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop_at_once)

    def work() -> None:
        config, plan_only = parse_arguments(description)
        if plan_only:
            dry_run(config)
            return
        with joined_ranks() as ranks, prepared(config, ranks) as run:
            measured(run, {"grpo": grpo, "sft": fine_tune}[config.method])

    with patient_output():
        return run_program("train.py", work)


def measured(run: Run, method: Method) -> None:
    """Measure accuracy, train, and measure again. Saves model and summary, and prints the table."""
    folder, questions, progress = Path(run.config.run_dir), run.questions.test, run.progress
    if progress.answers_before is None:
        progress.answers_before = run.answers(questions, "accuracy before")
    with saving_at_the_end(run):
        method(run, run.config)
    if run.ranks.leads:
        save_model(run.policy, folder / "model")
    before = accuracy_by_modality(questions, progress.answers_before)
    after = accuracy_by_modality(questions, run.answers(questions, "accuracy after"))
    if not run.ranks.leads:
        return
    blind = by_modality(questions, blind_credits(run.questions.train, questions))
    summary = run_summary(
        before,
        after,
        blind,
        steps=progress.step,
        seconds=progress.seconds,
        tokens=progress.tokens,
    )
    if progress.best:
        summary["validation"] = progress.best
    text = json.dumps(summary, indent=2) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")

    tokens = f"{progress.tokens:,} completion tokens"
    print(f"\n{progress.step} steps in {progress.seconds:.0f} s, {tokens}")
    for kind, count in run.log.incidents.items():
        print(f"incidents: {count} of kind {kind!r}, see {folder / 'incidents.jsonl'}")
    if progress.best:
        print(_best_validation(run, folder))
    if after:
        table = comparison_table(before, after, blind)
        print(f"Greedy accuracy in percent (95% interval):\n\n{table}\n")
    print(f"model:  {folder / 'model'}\ncurves: tensorboard --logdir {folder / 'tensorboard'}")


def _best_validation(run: Run, folder: Path) -> str:
    """One line on the best validation: accuracy, best guess without the image, checkpoint."""
    questions, best = run.questions.validation, run.progress.best
    credits = blind_credits(run.questions.train, questions)
    blind_rate = max(map(sum, credits.values())) / len(questions)
    accuracy = percent_with_interval(best["right"], best["total"])
    checkpoint = folder / "checkpoints" / f"step-{best['step']:06d}"
    return (
        f"best validation accuracy: {accuracy} percent of {best['total']} (best guess without the "
        f"image: {percent(blind_rate)} percent) after {best['step']} steps, saved in {checkpoint}"
    )
