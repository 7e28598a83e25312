"""Evaluate base, SFT and GRPO on every modality, as in MedVLM-R1's table, and audit the result.

    python evaluate.py --config configs/miniature.toml
    python evaluate.py --config FILE --models base,grpo --questions FILE ... --samples 8
    python evaluate.py --ask "What is seen?" --image scan.png --options Lungs Bladder --model FOLDER

The first command answers all test questions with each model, greedily, and again without the image,
with the options permuted, and with the reasoning truncated or swapped. It writes results.json,
predictions.jsonl, probes.jsonl and report.html to eval/ in the run folder. The second, with other
models or questions, writes to its own folder beside eval/ (eval-base-grpo-FILE). An evaluation that
was killed resumes where it stopped. The third puts one question to one model.
"""

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

from common.command_line import config_of, config_parser
from common.config import Config
from common.device import use_device
from common.errors import InputError, printable
from common.program import run_program
from evaluation.ask import ask, printable_lines
from evaluation.audits.leakage import leakage
from evaluation.contract import claim, contract
from evaluation.examine import chosen_questions, examine, probe_names
from evaluation.models import (
    Folders,
    model_digest,
    model_folders,
    results_folder,
    training_curves,
    usual_models,
)
from evaluation.records import Records, Rows
from evaluation.report.page import write_report
from evaluation.report.table import results_table
from evaluation.results import cases, measure, sample_rows

FIELDS = ("run_dir", "model", "train_questions", "image_dir", "test_count", "max_new_tokens",
          "min_pixels", "max_pixels", "eval_batch_prompts", "seed", "dtype", "device")  # fmt: skip
"""Config fields that are flags of this program too."""
NOT_WITH_ASK = ("config", "models", "questions", "samples", "out")
"""Arguments that cannot be combined with --ask."""


def evaluate(config: Config, folders: Folders, out: Path, samples: int) -> None:
    """Evaluate the models in `folders` (name -> folder), write the results to `out` and print the
    table.
    """
    use_device(config)
    train, questions, encoder = chosen_questions(config)
    # Read all input files first, so that a bad one fails before the models run for hours.
    curves = training_curves(folders)
    shared = leakage(train, questions)
    terms = contract(config, encoder, questions)
    claim(out, terms)
    digests = {name: model_digest(folder) for name, folder in folders.items()}
    records = Records(out, terms, digests, questions)
    if records.dropped:
        print(f"{records.dropped} rows dropped: their models have changed since")
    probes = probe_names(config, samples)
    rows_of = {}
    models: Rows = []
    drawn: Rows = []
    for name, folder in folders.items():
        examine(name, folder, records, config, samples)
        rows_of[name] = records.of(name, probes)
        if samples:
            drawn += sample_rows(name, rows_of[name], probes[-1])
        models.append({"name": name, "folder": str(folder), "digest": digests[name]})
    sampling = {"k": samples, "temperature": config.temperature, "seed": config.seed}
    results = {
        "name": Path(config.run_dir).name,
        "contract": terms,
        "models": models,
        "files": list(config.test_questions),
        "train_questions": config.train_questions,
        "train_modality": config.train_modality,
        **measure(rows_of, questions, train),
        "leakage": shared,
        "samples": sampling | {"table": drawn} if samples else None,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(out / "report.html", results, cases(rows_of, questions), curves)
    print(f"\n{printable_lines(results_table(results))}")
    print(f"\nresults: {printable(str(out))} (open report.html in a browser)")


def arguments() -> ArgumentParser:
    parser = config_parser(__doc__, FIELDS)
    add = parser.add_argument
    names = "base (the config's model), sft, blind, grpo (the runs RUN_sft, RUN_blind and RUN)"
    usual = "default: base,sft,grpo, and blind if it was trained"
    own = "default: eval/ in the run folder; eval-MODELS-FILES/ with --models or --questions"
    add("--models", metavar="NAMES", help=f"{names}, or NAME=FOLDER, separated by commas ({usual})")
    add(
        "--questions",
        nargs="+",
        default=[],
        metavar="FILE",
        help="question files instead of the config's",
    )
    add("--samples", type=int, default=0, metavar="K", help="also sample K answers, for pass@K")
    add("--out", type=Path, metavar="FOLDER", help=f"where to write the results ({own})")
    add("--ask", metavar="QUESTION", help="put this one question to --model, with --options")
    add("--image", nargs="+", type=Path, default=[], metavar="FILE", help="the images for --ask")
    add("--options", nargs="+", default=[], metavar="TEXT", help="2 to 10 options for --ask")
    return parser


def work() -> None:
    """Run what the command line asks for. InputError if that is nothing, or both modes."""
    given = vars(arguments().parse_args())
    if given["ask"] is not None:
        refused = [f"--{name}" for name in NOT_WITH_ASK if given[name]]
        if refused:
            raise InputError(
                f"--ask puts one question to one model; leave out {', '.join(refused)}"
            )
        return ask(given)
    if given["image"] or given["options"]:
        raise InputError("--image and --options need --ask QUESTION, which is missing")
    if given["config"] is None:
        raise InputError("--config FILE is missing (or --ask QUESTION); see evaluate.py --help")
    if given["samples"] < 0:
        raise InputError(f"--samples is {given['samples']}; it must be at least 0")
    config = config_of(given)
    files = given["questions"]
    names = given["models"].split(",") if given["models"] else usual_models(config.run_dir)
    # Before --questions replaces a field: runs must match the config as given.
    folders = model_folders(config, names)
    out = given["out"] or results_folder(config.run_dir, list(folders), files)
    if files:
        config = replace(config, test_questions=tuple(files), test_fraction=0.0)
    return evaluate(config, folders, out, given["samples"])


def main() -> int:
    return run_program("evaluate.py", work, "stopped; run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
