"""The table of MedVLM-R1, and whether it means what it seems to mean: base, SFT and GRPO on every
modality.

    python evaluate.py --config configs/miniature.toml [--models base,sft,grpo] [--questions FILE
    ...] [--samples 8] python evaluate.py --ask "What is seen?" --image scan.png --options Lungs
    Bladder --model runs/miniature/model

The first answers all test questions with each model, greedily, and again without the image, with
the options in another order and with the reasoning cut or exchanged. It leaves results.json,
predictions.jsonl, probes.jsonl and report.html in the run's folder eval/; a killed evaluation goes
on where it stopped. The second puts one question to one model.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.command_line import config_of, config_parser
from common.config import Config
from common.device import use_device
from common.errors import InputError
from common.hub import model_folder
from common.program import one_line as said
from data import load_vocabulary
from data.choice import load_questions, prompt_encoder
from evaluation.ask import ask, shown
from evaluation.audits.leakage import leakage
from evaluation.contract import claim, contract
from evaluation.examine import PLAIN, examine, probes_asked, question_ids
from evaluation.models import model_digest, model_folders
from evaluation.records import Records
from evaluation.report.curves import read_metrics
from evaluation.report.page import write_report
from evaluation.report.table import results_table
from evaluation.results import cases, measure
from model import read_config


def evaluate(config: Config, folders: dict[str, Path], out: Path, samples: int) -> None:
    """Answer, measure, audit and report; prints the table. `folders` holds each model's, by
    name.
    """
    use_device(config)
    train, _, questions = load_questions(config)
    if not questions:
        raise InputError(
            "there are no test questions: name question files by test_questions or --questions"
        )
    base = model_folder(config.model, weights=False)
    shape = read_config(base)
    encoder = prompt_encoder(load_vocabulary(base, shape), shape, config)
    questions, skipped = encoder.select(questions)
    if skipped:
        print(f"{skipped} questions left out as longer than {config.max_prompt_tokens} tokens")
    ids = question_ids(questions)

    # All that can be wrong with files shows before the models work.
    runs = {
        name: read_metrics(file)
        for name, folder in folders.items()
        if (file := folder.parent / "metrics.jsonl").exists()
    }
    shared = leakage(train, questions)
    terms = contract(config, encoder, questions)
    claim(out / "contract.json", terms)
    digests = {name: model_digest(folder) for name, folder in folders.items()}
    with (
        Records(out / "predictions.jsonl", terms["hash"], digests) as predictions,
        Records(out / "probes.jsonl", terms["hash"], digests) as probes,
    ):
        if predictions.dropped or probes.dropped:
            print(
                f"{predictions.dropped + probes.dropped} older rows dropped: their models have changed since"
            )
        for name, folder in folders.items():
            examine(name, folder, config, terms, questions, ids, predictions, probes, samples)
        asked = probes_asked(config, samples)
        rows_of = {
            name: {
                probe: (predictions if probe == PLAIN else probes).of(name, probe, len(ids))
                for probe in asked
            }
            for name in folders
        }

    measured = measure(rows_of, questions, train)
    sampled = {
        "k": samples,
        "temperature": config.temperature,
        "seed": config.seed,
        "table": measured.pop("sampled"),
    }
    results: dict[str, Any] = {
        "name": Path(config.run_dir).name,
        "contract": terms,
        "models": [
            {"name": name, "folder": str(folder), "digest": digests[name]}
            for name, folder in folders.items()
        ],
        "files": list(config.test_questions),
        "train_questions": config.train_questions,
        "train_modality": config.train_modality,
        **measured,
        "leakage": shared,
        "samples": sampled if samples else None,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(out / "report.html", results, cases(rows_of, questions, ids), runs)
    print(f"\n{shown(results_table(results))}\n\nreport: {shown(str(out / 'report.html'))}")


FIELDS = ("run_dir", "model", "train_questions", "image_dir", "test_count", "max_new_tokens", "min_pixels",
          "max_pixels", "eval_batch_prompts", "seed", "dtype", "device")  # fmt: skip
"""Of the config, those that may be given here too."""


def arguments() -> ArgumentParser:
    parser = config_parser(__doc__, FIELDS)
    parser.formatter_class = RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--models", metavar="NAMES", help="what to compare: base (the config's model), grpo (the run's), sft (that of "
        "the run folder with _sft behind its name), or NAME=FOLDER for any other (default: base,sft,grpo)")  # fmt: skip
    add("--questions", nargs="+", metavar="FILE", help="question files instead of the config's")
    add("--samples", type=int, default=0, metavar="K",
        help="draw K answers to each question too, for pass@K and majority vote (default: 0)")  # fmt: skip
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go (default: eval/ in the run's folder)",
    )
    add("--ask", metavar="QUESTION", help="put this one question to --model, with --options")
    add("--image", nargs="+", type=Path, default=[], metavar="FILE", help="the image of --ask")
    add("--options", nargs="+", metavar="TEXT", help="the options of --ask, 2 to 10")
    return parser


def run(given: dict[str, Any]) -> None:
    """Do what the command line asks for. InputError if it asks for nothing, or for both."""
    table = [f"--{name}" for name in ("models", "questions", "samples", "out") if given[name]]
    if given["ask"] is not None:
        if table:
            raise InputError(f"--ask puts one question to one model, without {', '.join(table)}")
        return ask(given)
    if given["image"] or given["options"]:
        raise InputError("--image and --options belong to --ask QUESTION, which is missing")
    if given["config"] is None:
        raise InputError("--config FILE is missing (or --ask QUESTION); see evaluate.py --help")
    if given["samples"] < 0:
        raise InputError(f"--samples is {given['samples']}; it must not be negative")
    config = config_of(given)
    names = (given["models"] or "base,sft,grpo").split(",")
    folders = model_folders(
        config, names
    )  # which compares runs with the config as it stands in its file
    if given["questions"]:
        config = replace(config, test_questions=tuple(given["questions"]), test_fraction=0.0)
    evaluate(config, folders, given["out"] or Path(config.run_dir) / "eval", given["samples"])


def main() -> int:
    try:
        run(vars(arguments().parse_args()))
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"evaluate.py: {said(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
