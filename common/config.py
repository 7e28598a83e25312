"""A run, in one frozen dataclass: read from TOML, overridden by flags, written back as resolved.

Fields stand under headings, the tables of the TOML file; flags are flat (`--beta 0.1`). The string
under a field is its help text. An unknown key, or a value of the wrong type or out of bounds, is an
error, never ignored.
"""

import json
import math
import operator
import re
import tomllib
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from .errors import InputError
from .files import read_bytes


def plain(default: Any = MISSING, *, may_change: bool = False) -> Any:
    """A text, several, or a switch; without a default it must be given.

    `may_change`, here and below: also when a run is resumed.
    """
    return field(default=default, metadata={"may_change": may_change})


def choice(*values: str, may_change: bool = False) -> Any:
    """One of a few words; the first is the default."""
    return field(default=values[0], metadata={"choices": values, "may_change": may_change})


def number(default: float, *, may_change: bool = False, **bounds: float) -> Any:
    """A number within bounds: `least` and `most` are allowed, `above` and `below` are not."""
    # A float must be finite, and TOML promises no whole numbers of more than 63 bits.
    bounds = {"below": math.inf if isinstance(default, float) else 2**63} | bounds
    return field(default=default, metadata={"bounds": bounds, "may_change": may_change})


@dataclass(frozen=True, kw_only=True)
class Run:
    """the run itself"""

    run_dir: str = plain(may_change=True)
    """folder that receives metrics, completions, checkpoints and the trained model"""
    method: str = choice("grpo", "sft")
    """"grpo" learns from rewarded samples, "sft" from the right letters (supervised fine-tuning)"""
    seed: int = number(0, least=0)
    """decides the order of questions and every sampled token"""
    steps: int = number(300, least=1, most=10_000_000)
    """rollouts, each followed by `inner_updates` optimiser steps"""
    max_bad_steps: int = number(3, least=1, may_change=True)
    """steps in a row whose loss or gradient is not finite (each is left out and recorded) before
    the run ends"""
    save_every: int = number(50, least=1, may_change=True)
    """steps between checkpoints"""
    keep_checkpoints: int = number(2, least=1, may_change=True)
    """newest checkpoints that are kept, beside the best on validation: two, in case the newest gets
    damaged"""
    log_samples_every: int = number(10, least=1, may_change=True)
    """steps between sample images and completions in TensorBoard"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """the model, and how images reach it"""

    model: str = plain(may_change=True)
    """base model (Qwen2-VL): a folder in Hugging Face layout, or a hub id such as
    Qwen/Qwen2-VL-2B-Instruct"""
    freeze_vision: bool = plain(False)
    """leave the vision tower as it is, so that each image is encoded once per step (the paper's run
    trains it)"""
    min_pixels: int = number(3136, least=1)
    """smaller images are enlarged to at least so many pixels (paper's run: 56 x 56)"""
    max_pixels: int = number(401408, least=1)
    """larger images are shrunk to at most so many pixels (paper's run: 512 image tokens)"""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """what is trained on"""

    train_questions: str = plain(may_change=True)
    """question file to train on (JSON or JSON lines; see data/readers.py for the dialects)"""
    image_dir: str = plain("", may_change=True)
    """folder that image paths are relative to; empty means each question file's own folder"""
    train_modality: str = plain("")
    """train on this modality only, such as MRI; empty takes all"""
    train_count: int = number(0, least=0)
    """train on so many questions, drawn with the seed; 0 takes all"""
    images: str = choice("own", "blank", "noise", "other")
    """what training shows: each question's "own" images, or in their place grey ones ("blank"),
    "noise", or an "other" question's; a model trained so tells how much of a gain needs no sight"""
    bad_images: str = choice("error", "skip", may_change=True)
    """what a training image that can't be read does: "error" ends the run, "skip" leaves its
    question out and counts it"""
    max_prompt_tokens: int = number(1024, least=1)
    """longest prompt, image tokens included; prompts are never truncated"""
    too_long: str = choice("error", "skip")
    """what a longer prompt does: "error" stops the run before it starts, "skip" leaves it out and
    counts it"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """what accuracy is measured on"""

    test_questions: tuple[str, ...] = plain((), may_change=True)
    """question files whose accuracy per modality is measured before and after; none skips that"""
    test_count: int = number(0, least=0)
    """test on so many questions of each modality, drawn with the seed; 0 takes all"""
    test_fraction: float = number(0.0, least=0, below=1)
    """hold out this share of train_questions, whole images at a time, and test on it too"""
    validation_questions: tuple[str, ...] = plain((), may_change=True)
    """question files to validate on while the run goes on: neither their questions nor their images
    may be trained on"""
    validation_fraction: float = number(0.0, least=0, below=1)
    """hold out this share of train_questions too, whole images at a time, and validate on it"""
    validation_count: int = number(0, least=0)
    """validate on so many questions of each modality, drawn with the seed; 0 takes all"""
    validate_every: int = number(50, least=1, may_change=True)
    """steps between two measurements of greedy accuracy on the validation questions; each is saved
    as a checkpoint"""
    eval_batch_prompts: int = number(64, least=1, may_change=True)
    """questions decoded at once when accuracy is measured"""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """what a step samples"""

    prompts_per_step: int = number(4, least=1, most=100_000)
    """N, questions in a step"""
    group_size: int = number(8, least=2, most=10_000)
    """G, completions sampled for each question; a group of one has nothing to be compared with"""
    max_new_tokens: int = number(512, least=1, most=1_000_000)
    """T, longest completion in tokens"""
    temperature: float = number(1.0, above=0)
    """divides the logits, in sampling and in the loss alike"""


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """weights of the rules in the reward"""

    format_weight: float = number(1.0, least=0)
    """weight of the format rule: a think block, then an answer block, and nothing else"""
    accuracy_weight: float = number(1.0, least=0)
    """weight of the accuracy rule: the right letter, alone (1) or with something added (0.5)"""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """the objective"""

    inner_updates: int = number(1, least=1)
    """mu, optimiser steps on one rollout; with 1 the ratio is exactly 1 and nothing is clipped"""
    clip_low: float = number(0.2, least=0, most=1)
    """the probability ratio is clipped below at 1 - clip_low"""
    clip_high: float = number(0.2, least=0)
    """the probability ratio is clipped above at 1 + clip_high"""
    beta: float = number(0.04, least=0)
    """weight of the KL term against the frozen base model; 0 leaves the reference out"""
    advantage_scale: str = choice("std", "none")
    """"std" divides a group's centred rewards by their standard deviation (GRPO), "none" does not
    (Dr. GRPO)"""
    loss_average: str = choice("sequence", "token", "constant")
    """what the loss averages over: "sequence" (GRPO), "token" (DAPO), "constant" (Dr. GRPO)"""
    sft_answer: str = choice("tags", "bare", "named")
    """what "sft" trains on: "tags" is <answer>B</answer>, "bare" is B, "named" thinks the option's
    text, then tags B"""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW"""

    learning_rate: float = number(1e-6, above=0)
    """AdamW's peak learning rate"""
    warmup_steps: int = number(0, least=0)
    """steps over which the learning rate rises from 0"""
    final_lr_ratio: float = number(1.0, least=0)
    """where the learning rate goes by the end, over the peak, linearly: 1 is constant, 0 decays to
    nothing"""
    adam_beta1: float = number(0.9, least=0, below=1)
    """AdamW's decay of the mean gradient"""
    adam_beta2: float = number(0.999, least=0, below=1)
    """AdamW's decay of the mean squared gradient"""
    weight_decay: float = number(0.0, least=0)
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = number(1.0, above=0)
    """gradients are scaled down to at most this norm"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """memory and speed"""

    device: str = plain("cpu", may_change=True)
    """cpu, or cuda"""
    dtype: str = choice("float32", "bfloat16")
    """what the model computes in; the optimiser's weights are float32 in any case"""
    micro_batch_tokens: int = number(4096, least=1, may_change=True)
    """tokens in one forward and backward, whole groups at a time; changes memory and speed, never
    the gradient"""
    activation_checkpointing: bool = plain(False, may_change=True)
    """keep no activations within a block, make them anew in backward: less memory, more time"""
    offload_optimizer: bool = plain(False, may_change=True)
    """keep fp32 weights, their gradients and AdamW's moments in the host's memory and update there,
    not on the GPU"""


HEADINGS = (Run, Model, Questions, Measurement, Rollout, Rewards, Loss, Optimizer, Machine)


@dataclass(frozen=True, kw_only=True)
class Config(Machine, Optimizer, Loss, Rewards, Rollout, Measurement, Questions, Model, Run):
    """Everything that decides what a run does.

    Paths are relative to the folder that the command is started in.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            self._require(one.name, *_within_bounds(one, getattr(self, one.name)))
        self._require(
            "warmup_steps", self.warmup_steps <= self.steps, f"at most steps ({self.steps})"
        )
        self._require("max_pixels", self.max_pixels >= self.min_pixels, "at least min_pixels")
        rewarded = self.format_weight or self.accuracy_weight
        self._require("accuracy_weight", rewarded, "above 0, as the other is not")
        device = re.fullmatch(r"cpu|cuda(:\d+)?", self.device)
        self._require("device", device, "cpu or cuda")

    def _require(self, name: str, holds: object, rule: str) -> None:
        if not holds:
            raise InputError(f"config: {name} is {getattr(self, name)!r}; it must be {rule}")


_BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def _within_bounds(field: Field[Any], value: Any) -> tuple[bool, str]:
    """Whether a field's value is within its own bounds, and what it must be."""
    if "choices" in field.metadata:
        choices = field.metadata["choices"]
        return value in choices, f"one of {', '.join(choices)}"
    for bound, limit in field.metadata.get("bounds", {}).items():
        holds, words = _BOUNDS[bound]
        if not holds(value, limit):  # NaN is outside of every bound
            return False, f"{words} {limit:,}"
    if isinstance(value, str | tuple):
        required = field.default is MISSING and not value
        # A shell may pass any byte; what can't be printed could not be written to config.toml.
        printable = "".join(value).isprintable()
        return printable and not required, "must be printable text, and not empty"
    return True, ""


def load_config(file: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a TOML file; `overrides` win over it. InputError names the file and the key."""
    known = {one.name: one for one in fields(Config)}
    values = {}
    for key, value in read_toml(file).items():
        if key not in known:
            remedy = "`python train.py --help` lists the known ones"
            raise InputError(f"{file}: unknown key {key!r}; {remedy}")
        values[key] = _typed(f"{file}: {key}", known[key].type, value)
    values |= overrides or {}
    for one in known.values():
        if one.default is MISSING and one.name not in values:
            raise InputError(f"{file}: {one.name} is missing; add it, or give --{one.name}")
    return Config(**values)


def read_toml(file: str | Path) -> dict[str, Any]:
    """A config file's keys and values, whichever heading they stand under."""
    try:
        tables = tomllib.loads(read_bytes(file).decode("utf-8"))
    except OSError as error:
        remedy = "configs/ has those that come along"
        raise InputError(f"{file}: can't read the config ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not TOML ({error}); configs/ has examples") from None
    headings = {heading.__name__.lower(): heading for heading in HEADINGS}
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if key not in headings or not isinstance(value, dict):
            values[key] = value
            continue
        allowed = {one.name for one in fields(headings[key])}
        for name in value:
            if name not in allowed:
                raise InputError(f"{file}: [{key}] has no field {name!r}; see train.py --help")
        values |= value
    return values


def config_toml(config: Config) -> str:
    """The resolved config, every field, as TOML."""
    lines = []
    for heading in HEADINGS:
        lines.append(f"[{heading.__name__.lower()}]")
        for one in fields(heading):
            value = json.dumps(getattr(config, one.name), ensure_ascii=False)
            lines.append(f"{one.name} = {value}")
        lines.append("")
    return "\n".join(lines)


def _typed(where: str, kind: Any, value: Any) -> Any:
    """The value as its field has it: a whole number may stand for a float, a text for a list."""
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return tuple(values)
        raise InputError(f"{where} must be a string or a list of strings")
    if type(value) is int and abs(value) >= 2**63:  # too long a number can't even be printed
        raise InputError(f"{where} must be a number of at most 63 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        # Python refuses to print a number of more than 4,300 digits, within a list too.
        quoted = f", not {value!r}" if isinstance(value, str | bool | float) else ""
        raise InputError(f"{where} must be {kind.__name__}{quoted}")
    return value
