"""One question to one model: its reasoning and answer, as they are written, and the log-probability
of each letter.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from common.config import Config
from common.device import use_device
from common.errors import InputError, printable
from common.hub import model_folder
from data import Question
from data.pixel_limits import read_pixel_limits

from .answers import Examinee, load_examinee
from .probes import letter_logprobs, opening_of

LIMITS = ("device", "dtype", "max_new_tokens", "min_pixels", "max_pixels")


def ask(given: dict[str, Any]) -> None:
    """Answer evaluate.py's `--ask`: `given` holds "ask", "image", "options", and of the config's
    fields "model" and `LIMITS`.
    """
    question = asked_question(given["ask"], given["image"], given["options"])
    if "model" not in given:
        raise InputError("--ask needs a model: give --model FOLDER, as that of a finished run")
    folder = model_folder(given["model"])
    # An image's limits are those that the folder knows: what a trained model was trained with.
    limits = read_pixel_limits(folder) | {name: given[name] for name in LIMITS if name in given}
    # A published checkpoint takes images of thousands of tokens; one question may be that long.
    limits["max_prompt_tokens"] = sys.maxsize
    config = Config(run_dir="none", model=given["model"], train_questions="none", **limits)
    use_device(config)
    examinee = load_examinee(folder, config)
    if not question.images:
        print("no --image: the question is put without one", file=sys.stderr)
    [(_, [answer])] = examinee.answers([question], "answer", [0])
    print(printable_lines(answer.text))
    if not answer.ended:
        print(f"(truncated after {answer.tokens} tokens)")
    print_letters(examinee, question, answer.text)
    print("\nFor research and teaching, not for diagnosis.")


def asked_question(text: str, images: list[Path], options: list[str]) -> Question:
    """A question from the command line; which answer is right is not known: A is as good as any."""
    if not 2 <= len(options) <= 10:
        raise InputError(f"--options makes {len(options)} options; give 2 to 10 texts")
    if not all(words.strip() for words in (text, *options)):
        raise InputError("--ask and --options must not be empty")
    # A shell may pass any byte.
    text, *options = [words.encode("utf-8", "replace").decode() for words in (text, *options)]
    return Question(tuple(images), text, tuple(options), "A", "unknown", "", "--ask")


def print_letters(examinee: Examinee, question: Question, text: str) -> None:
    """Write the log-probability of each option's letter after the reasoning of `text`."""
    prompts = [examinee.encoder.encode(question)]
    openings = [opening_of(text)]
    (logprobs,) = letter_logprobs(examinee.model, examinee.vocabulary, prompts, openings)
    # Among the letters alone: what else might stand there has its share of the probability too.
    shares = torch.tensor(list(logprobs.values())).softmax(0).tolist()
    when = "after that reasoning" if "<answer>" in text else "if asked for at once"
    print(f"\nlog-probability of each letter {when} (and its share):")
    rows = zip(logprobs.items(), shares, question.options, strict=True)
    for (letter, logprob), share, option in rows:
        print(f"  {letter}  {logprob:8.3f}  {share:6.1%}  {printable(option)}")


def printable_lines(text: str) -> str:
    """A text of several lines for the terminal: its lines stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))
