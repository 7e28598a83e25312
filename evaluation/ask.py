"""One question to one model: its reasoning and answer, as they are written, and the log-probability
of each letter.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.command_line import config_of
from common.config import Config
from common.device import use_device
from common.errors import InputError, printable
from common.hub import model_folder
from data import Prompt, Question, Vocabulary
from data.pixel_limits import read_pixel_limits
from grpo.sampler import sample_groups

from .answers import Examinee, load_examinee
from .probes import letter_logprobs, opening_of

LIMITS = ("device", "dtype", "max_new_tokens", "min_pixels", "max_pixels")
NOTICE = "For research and teaching, not for diagnosis."


def ask(given: dict[str, Any]) -> None:
    """Answer evaluate.py's `--ask`: `given` holds "ask", "image", "options", "config", and the
    config's fields. Text is written as it comes where the output is a terminal.
    """
    question = asked_question(given["ask"], given["image"], given["options"])
    config, folder = _config_and_model(given)
    use_device(config)
    examinee = load_examinee(folder, config)
    prompt = examinee.encoder.encode(question)
    if not question.images:
        print("no --image: the question is put without one", file=sys.stderr)
    print_letters(examinee, prompt, print_answer(examinee, prompt))
    print(f"\n{NOTICE}")


def asked_question(text: str, images: list[Path], options: list[str]) -> Question:
    """A question from the command line; which answer is right is not known: A is as good as any."""
    if not 2 <= len(options) <= 10:
        raise InputError(f"--options makes {len(options)} options; give 2 to 10 texts")
    if not all(words.strip() for words in (text, *options)):
        raise InputError("--ask and --options must not be empty")
    # A shell may pass any byte.
    text, *options = [words.encode("utf-8", "replace").decode() for words in (text, *options)]
    return Question(tuple(images), text, tuple(options), "A", "unknown", "", "--ask")


def _config_and_model(given: dict[str, Any]) -> tuple[Config, Path]:
    """The limits to answer within, and the model's folder.

    With a config both are its own, but --model may name another model. Without one an image's
    limits are those that the model's folder knows: what a trained model was trained with.
    """
    if given["config"] is not None:
        config = config_of(given)
        return config, model_folder(given.get("model") or str(Path(config.run_dir) / "model"))
    if "model" not in given:
        raise InputError(
            "--ask needs a model: give --model FOLDER, or the --config of a finished run"
        )
    folder = model_folder(given["model"])
    limits = read_pixel_limits(folder) | {name: given[name] for name in LIMITS if name in given}
    # A published checkpoint takes images of thousands of tokens; one question may be that long.
    limits["max_prompt_tokens"] = sys.maxsize
    return Config(run_dir="none", model=given["model"], train_questions="none", **limits), folder


def print_answer(examinee: Examinee, prompt: Prompt) -> str:
    """Write the greedy completion, token by token on a terminal, and return it."""
    # A file or a pipe gets the text in one piece: nobody watches it grow.
    typewriter, limit = Typewriter(examinee.vocabulary), examinee.config.max_new_tokens
    watch = typewriter if sys.stdout.isatty() else None
    rollout = sample_groups(
        examinee.model, examinee.vocabulary, [prompt], None, max_new_tokens=limit, watch=watch
    )
    text = rollout.texts[0][0]
    typewriter.write(text)
    print()
    if not rollout.ended_NG[0, 0]:
        print(f"(truncated after {limit} tokens)")
    return text


def print_letters(examinee: Examinee, prompt: Prompt, text: str) -> None:
    """Write the log-probability of each option's letter after the reasoning of `text`."""
    model, vocabulary = examinee.model, examinee.vocabulary
    (logprobs,) = letter_logprobs(model, vocabulary, [prompt], [opening_of(text)])
    # Among the letters alone: what else might stand there has its share of the probability too.
    shares = torch.tensor(list(logprobs.values())).softmax(0).tolist()
    when = "after that reasoning" if "<answer>" in text else "if asked for at once"
    print(f"\nlog-probability of each letter {when} (and its share):")
    rows = zip(logprobs.items(), shares, prompt.question.options, strict=True)
    for (letter, logprob), share, option in rows:
        print(f"  {letter}  {logprob:8.3f}  {share:6.1%}  {printable(option)}")


def printable_lines(text: str) -> str:
    """A text of several lines for the terminal: its lines stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


class Typewriter:
    """Prints a completion as it grows; handed to the sampler, which calls it with each new
    token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.printed = vocabulary, ""
        self.ids: list[int] = []

    def __call__(self, tokens_NG: Tensor) -> None:
        self.ids.append(int(tokens_NG))
        text = self.vocabulary.decode(torch.tensor(self.ids))
        if not text.endswith("\ufffd"):  # half a character so far
            self.write(text)

    def write(self, text: str) -> None:
        """Print what of the text has not been printed yet."""
        print(printable_lines(text[len(self.printed) :]), end="", flush=True)
        self.printed = text
