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
from data import Question, Vocabulary, load_vocabulary, option_letter
from data.choice import prompt_encoder
from grpo.sampler import sample_groups
from model import load_model

from .probes import letter_logprobs, opening_of

NOTICE = "For research and teaching, not for diagnosis."


def ask(given: dict[str, Any]) -> None:
    """Answer evaluate.py's `--ask`: `given` holds "ask", "image", "options", "config", and the
    config's fields.

    Without a config the model is "model" and the limits are the defaults; with one, "model" may
    still name another. Text is written as it comes where the output is a terminal.
    """
    question = asked_question(given["ask"], given["image"], given["options"] or [])
    if given["config"] is not None:
        config = config_of(given)
        folder = model_folder(given.get("model") or str(Path(config.run_dir) / "model"))
    elif "model" in given:
        limits = ("model", "device", "dtype", "max_new_tokens", "min_pixels", "max_pixels")
        fields = {name: given[name] for name in limits if name in given}
        config = Config(**fields, train_questions="none", run_dir="none")
        folder = model_folder(config.model)
    else:
        raise InputError(
            "--ask needs a model: give --model FOLDER, or the --config of a finished run"
        )
    use_device(config)
    model = load_model(folder, config.device, config.dtype).requires_grad_(False)
    vocabulary = load_vocabulary(folder, model.config, config.device)
    prompt = prompt_encoder(vocabulary, model.config, config).encode(question)

    if not question.images:
        print("no --image: the question is put without one", file=sys.stderr)
    live = Typewriter(vocabulary) if sys.stdout.isatty() else None
    rollout = sample_groups(
        model, vocabulary, [prompt], None, max_new_tokens=config.max_new_tokens, watch=live
    )
    text = rollout.texts[0][0]
    print(live.rest(text) if live else shown(text))
    if not bool(rollout.ended_NG[0, 0]):
        print(f"(cut off after {config.max_new_tokens} tokens)")
    (logps,) = letter_logprobs(model, vocabulary, [prompt], [opening_of(text)])
    when = "after that reasoning" if "<answer>" in text else "if asked for at once"
    print(f"\nlog-probability of each letter {when} (and its share):")
    shares = torch.tensor(list(logps.values())).softmax(0).tolist()
    for (letter, logp), share, option in zip(logps.items(), shares, question.options, strict=True):
        print(f"  {letter}  {logp:8.3f}  {share:6.1%}  {printable(option)}")
    print(f"\n{NOTICE}")


def asked_question(text: str, images: list[Path], options: list[str]) -> Question:
    """A question from the command line; which answer is right is not known, so that A is as good as
    any.
    """
    if not 2 <= len(options) <= 10:
        raise InputError(f"--options makes {len(options)} options; give 2 to 10 texts")
    if not text.strip() or not all(option.strip() for option in options):
        raise InputError("--ask and --options must not be empty")
    text, *options = (
        words.encode("utf-8", "replace").decode() for words in (text, *options)
    )  # a shell may pass any byte
    return Question(tuple(images), text, tuple(options), option_letter(0), "unknown", "", "--ask")


def shown(text: str) -> str:
    """A completion for the terminal: its lines stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


class Typewriter:
    """Prints a completion as it grows; handed to the sampler, which calls it with each new
    token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.ids, self.shown = vocabulary, [], ""

    def __call__(self, tokens_NG: Tensor) -> None:
        self.ids.append(int(tokens_NG[0, 0]))
        text = self.vocabulary.decode(torch.tensor(self.ids))
        if not text.endswith("\ufffd"):  # half a character so far
            print(self.rest(text), end="", flush=True)

    def rest(self, text: str) -> str:
        """What of the text has not been shown yet; it counts as shown from now on."""
        new, self.shown = text[len(self.shown) :], text
        return shown(new)
