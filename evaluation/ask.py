"""Put one question to one model: print its completion and the log-probability of each letter."""

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
    """Run evaluate.py's `--ask`.

    `given` holds "ask", "image" and "options", and those of the config fields "model" and `LIMITS`
    that were given.
    """
    question = question_of(given["ask"], given["image"], given["options"])
    if "model" not in given:
        raise InputError("--ask needs a model: give --model FOLDER, such as a run's model/")
    folder = model_folder(given["model"])
    # The folder's own pixel limits are those that its model was trained with.
    limits = read_pixel_limits(folder) | {name: given[name] for name in LIMITS if name in given}
    # A published checkpoint takes images of thousands of tokens; a single question may be long.
    limits["max_prompt_tokens"] = sys.maxsize
    config = Config(run_dir="none", model=given["model"], train_questions="none", **limits)
    use_device(config)
    examinee = load_examinee(folder, config)
    if not question.images:
        print("no --image given: asking without an image", file=sys.stderr)
    [(_, [answer])] = examinee.answers([question], "answer", [0])
    print(printable_lines(answer.text))
    if not answer.ended:
        print(f"(truncated after {answer.tokens} tokens)")
    print_letters(examinee, question, answer.text)
    print("\nFor research and teaching, not for diagnosis.")


def question_of(text: str, images: list[Path], options: list[str]) -> Question:
    """The question of a command line. Its right answer is unknown: A is a placeholder."""
    if not 2 <= len(options) <= 10:
        raise InputError(f"--options holds {len(options)} texts; give 2 to 10")
    if not all(words.strip() for words in (text, *options)):
        raise InputError("--ask and --options must not be empty")
    # A shell may pass bytes that are not UTF-8.
    text, *options = [words.encode("utf-8", "replace").decode() for words in (text, *options)]
    return Question(tuple(images), text, tuple(options), "A", "unknown", "", "--ask")


def print_letters(examinee: Examinee, question: Question, text: str) -> None:
    """Print the log-probability of each option's letter after the reasoning of `text`."""
    prompts = [examinee.encoder.encode(question)]
    openings = [opening_of(text)]
    (logprobs,) = letter_logprobs(examinee.model, examinee.vocabulary, prompts, openings)
    # Normalised over the letters: other tokens have some of the probability too.
    shares = torch.tensor(list(logprobs.values())).softmax(0).tolist()
    when = "after this reasoning" if "<answer>" in text else "if the answer is forced"
    print(f"\nlog-probability of each letter {when} (and its share among the letters):")
    rows = zip(logprobs.items(), shares, question.options, strict=True)
    for (letter, logprob), share, option in rows:
        print(f"  {letter}  {logprob:8.3f}  {share:6.1%}  {printable(option)}")


def printable_lines(text: str) -> str:
    """The text, made safe for the terminal line by line, so that its line breaks stay."""
    return "\n".join(printable(line) for line in text.split("\n"))
