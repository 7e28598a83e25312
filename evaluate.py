"""The table of MedVLM-R1, and whether it means what it seems to mean: base, SFT and GRPO on every modality.

    python evaluate.py --config configs/miniature.toml [--models base,sft,grpo] [--questions FILE ...] [--samples 8]
    python evaluate.py --ask "What is seen?" --image scan.png --options Lungs Bladder --model runs/miniature/model

The first answers all test questions with each model, greedily, and again without the image, with the options in another
order and with the reasoning cut or exchanged. It leaves results.json, predictions.jsonl, probes.jsonl and report.html
in the run's folder eval/; a killed evaluation goes on where it stopped. The second puts one question to one model.
"""

import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import Question, load_vocabulary
from evaluation.ask import ask
from evaluation.blind import blind_credits, by_modality
from evaluation.contract import claim, contract, model_folders, weights_digest
from evaluation.examine import examine, probes_asked, question_ids
from evaluation.leakage import leakage
from evaluation.records import Records
from evaluation.report import write_report
from evaluation.results import (
    ablated_rows,
    accuracy_rows,
    cases,
    early_answering,
    faithfulness_rows,
    pair_rows,
    results_table,
    sample_rows,
)
from grpo.config import Config, config_of, config_parser
from grpo.run import load_questions, prompt_encoder
from model import InputError, read_config


def evaluate(config: Config, names: Sequence[str], out: Path, samples: int) -> None:
    """Answer, count, compare, audit and report; prints the table."""
    started = time.perf_counter()
    train, questions = load_questions(config)
    if not questions:
        raise InputError("there are no test questions: name question files by test_questions or --questions")
    folders = model_folders(config, names)
    shape = read_config(config.model)
    encoder = prompt_encoder(load_vocabulary(config.model, shape), shape, config)
    questions, skipped = encoder.select(questions)
    if skipped:
        print(f"{skipped} questions left out as longer than {config.max_prompt_tokens} tokens")
    ids = question_ids(questions)

    terms = contract(config, encoder, questions)
    claim(out / "contract.json", terms)
    weights = {name: weights_digest(folder) for name, folder in folders.items()}
    with (
        Records(out / "predictions.jsonl", terms["hash"], weights) as predictions,
        Records(out / "probes.jsonl", terms["hash"], weights) as probes,
    ):
        if predictions.dropped or probes.dropped:
            print(f"{predictions.dropped + probes.dropped} older rows dropped: their models have changed since")
        for name, folder in folders.items():
            examine(name, folder, config, terms, questions, ids, predictions, probes, samples)
        rows_of = {
            name: {
                probe: (predictions if probe == "plain" else probes).of(name, probe, ids)
                for probe in probes_asked(samples)
            }
            for name in folders
        }

    credits = blind_credits(train, questions)
    results = {
        "name": Path(config.run_dir).name,
        "contract": terms,
        "models": [{"name": name, "folder": str(folder), "weights": weights[name]} for name, folder in folders.items()],
        "files": list(config.test_questions),
        "train_questions": config.train_questions,
        "train_modality": config.train_modality,
        "accuracy": [row for name, rows in rows_of.items() for row in accuracy_rows(name, rows, questions, credits)],
        "pairs": pair_rows(rows_of, questions),
        "blind": by_modality(questions, credits),
        "ablated": {name: ablated_rows(rows, questions) for name, rows in rows_of.items()},
        "faithfulness": [row for name, rows in rows_of.items() for row in faithfulness_rows(name, rows)],
        "early_answering": {name: early_answering(rows) for name, rows in rows_of.items()},
        "leakage": leakage(train, questions),
        "samples": {
            "k": samples,
            "temperature": config.temperature,
            "table": [
                row for name, rows in rows_of.items() for row in sample_rows(name, rows[f"{samples} samples"], questions)
            ],
        }
        if samples
        else None,
    }
    results["seconds"] = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    curves = {name: metrics for name, folder in folders.items() if (metrics := run_metrics(folder.parent))}
    write_report(out / "report.html", results, cases(rows_of, questions, ids), curves)
    print(f"\n{results_table(results)}\n\nreport: {out / 'report.html'}")


def run_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none if the folder is no run."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


EVALUATED = ("run_dir", "model", "train_questions", "image_dir", "test_count", "eval_batch_prompts", "dtype", "device")


def arguments() -> ArgumentParser:
    parser = config_parser(__doc__, EVALUATED)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument(
        "--models", default="base,sft,grpo", metavar="NAMES",
        help="what to compare: base (the config's model), grpo (the run's), sft (that of the run folder with _sft behind "
        "its name), or NAME=FOLDER for any other (default: base,sft,grpo)",
    )  # fmt: skip
    parser.add_argument("--questions", nargs="+", metavar="FILE", help="question files instead of the config's")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="K",
        help="draw K answers to each question too, for pass@K and majority vote (default: 0)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: eval/ in the run's folder)")
    parser.add_argument("--ask", metavar="QUESTION", help="put this one question to --model, with --options")
    parser.add_argument("--image", nargs="+", type=Path, default=[], metavar="FILE", help="the image of --ask")
    parser.add_argument("--options", nargs="+", metavar="TEXT", help="the options of --ask, 2 to 10")
    return parser


def main() -> int:
    try:
        given = vars(arguments().parse_args())
        if given["ask"] is not None:
            ask(given)
            return 0
        if given["config"] is None:
            raise InputError("--config FILE is missing (or --ask QUESTION); see evaluate.py --help")
        config = config_of(given)
        if given["questions"]:
            config = replace(config, test_questions=tuple(given["questions"]), test_fraction=0.0)
        if given["samples"] < 0:
            raise InputError(f"--samples is {given['samples']}; it must not be negative")
        names = [name for name in given["models"].split(",") if name]
        evaluate(config, names, given["out"] or Path(config.run_dir) / "eval", given["samples"])
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
