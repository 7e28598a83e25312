"""The config of a run: a frozen dataclass, read from TOML and overridden by flags.

Fields are grouped under headings, which are the tables of the TOML file; flags are flat
(`--beta 0.1`). The string under a field is its help text. Unknown keys, and values of the wrong
type or out of bounds, are errors.
"""

import json
import math
import operator
import re
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from .errors import InputError
from .files import read_bytes


def plain(default: Any = MISSING, *, may_change: bool = False) -> Any:
    """A field that holds a string, a tuple of strings or a bool; required if it has no default.

    `may_change`, here and below: the value may differ when a run is resumed.
    """
    return field(default=default, metadata={"may_change": may_change})


def choice(*values: str, may_change: bool = False) -> Any:
    """A field that holds one of several words; the first is the default."""
    return field(default=values[0], metadata={"choices": values, "may_change": may_change})


def number(default: float, *, may_change: bool = False, **bounds: float) -> Any:
    """A field that holds a number; bounds `least` and `most` are inclusive, the others are not."""
    # Floats must be finite, and TOML guarantees no integers of more than 63 bits.
    bounds = {"below": math.inf if isinstance(default, float) else 2**63} | bounds
    return field(default=default, metadata={"bounds": bounds, "may_change": may_change})


@dataclass(frozen=True, kw_only=True)
class Run:
    """the run itself"""

    run_dir: str = plain(may_change=True)
    """run folder: receives metrics, completions, checkpoints and the trained model"""
    method: str = choice("grpo", "sft")
    """"grpo" learns from rewarded completions, "sft" (supervised fine-tuning) from the correct
    answers"""
    seed: int = number(0, least=0)
    """determines the order of questions and every sampled token"""
    steps: int = number(300, least=1, most=10_000_000)
    """number of rollouts, each followed by `inner_updates` optimiser steps"""
    max_bad_steps: int = number(3, least=1, may_change=True)
    """end the run after this many consecutive steps whose loss or gradient is not finite (each such
    update is skipped and logged)"""
    save_every: int = number(50, least=1, may_change=True)
    """steps between checkpoints"""
    keep_checkpoints: int = number(2, least=1, may_change=True)
    """number of newest checkpoints to keep, besides the best on validation; two, in case the newest
    is damaged"""
    log_samples_every: int = number(10, least=1, may_change=True)
    """steps between samples (an image and its completions) in TensorBoard"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """the model and its image sizes"""

    model: str = plain(may_change=True)
    """base model (Qwen2-VL): a folder in Hugging Face layout, or a hub id such as
    Qwen/Qwen2-VL-2B-Instruct"""
    freeze_vision: bool = plain(False)
    """keep the vision tower fixed, so that each image is encoded once per step (the paper trains
    it)"""
    min_pixels: int = number(3136, least=1)
    """smaller images are enlarged to at least this many pixels (paper: 56 x 56)"""
    max_pixels: int = number(401408, least=1)
    """larger images are shrunk to at most this many pixels (paper: 512 image tokens)"""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """the training data"""

    train_questions: str = plain(may_change=True)
    """question file to train on (JSON or JSON lines; see data/readers.py for the formats)"""
    image_dir: str = plain("", may_change=True)
    """folder that image paths are relative to; empty means the folder of each question file"""
    train_modality: str = plain("")
    """train on this modality only, such as MRI; empty means all"""
    train_count: int = number(0, least=0)
    """train on this many questions, drawn with the seed; 0 means all"""
    images: str = choice("own", "blank", "noise", "other")
    """images to train on: each question's "own" images, or instead grey ones ("blank"), "noise", or
    those of an "other" question, to measure how much of a gain does not depend on the image"""
    bad_images: str = choice("error", "skip", may_change=True)
    """handling of unreadable training images: "error" ends the run, "skip" skips the question and
    logs it"""
    max_prompt_tokens: int = number(1024, least=1)
    """length limit of prompts, including image tokens; prompts are never truncated"""
    too_long: str = choice("error", "skip")
    """handling of longer prompts: "error" refuses to start the run, "skip" skips and counts them"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """the test and validation data"""

    test_questions: tuple[str, ...] = plain((), may_change=True)
    """question files to test on, per modality, before and after training; empty means no test"""
    test_count: int = number(0, least=0)
    """test on this many questions of each modality, drawn with the seed; 0 means all"""
    test_fraction: float = number(0.0, least=0, below=1)
    """fraction of train_questions to hold out and also test on, split by image"""
    validation_questions: tuple[str, ...] = plain((), may_change=True)
    """question files to validate on during training; no question or image may be in the training
    set too"""
    validation_fraction: float = number(0.0, least=0, below=1)
    """fraction of train_questions to hold out and also validate on, split by image"""
    validation_count: int = number(0, least=0)
    """validate on this many questions of each modality, drawn with the seed; 0 means all"""
    validate_every: int = number(50, least=1, may_change=True)
    """steps between validations (greedy accuracy); a checkpoint is saved after each"""
    eval_batch_prompts: int = number(64, least=1, may_change=True)
    """number of questions to decode at once when measuring accuracy"""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """the sampling of completions"""

    prompts_per_step: int = number(4, least=1, most=100_000)
    """N, number of questions per step"""
    oversampling: float = number(1.0, least=1, most=100)
    """questions sampled per step, over prompts_per_step, rounded up: groups of equal rewards, which
    teach nothing, give way to the spare ones (DAPO's dynamic sampling); 1 is off"""
    group_size: int = number(8, least=2, most=10_000)
    """G, number of completions sampled per question; at least two, to compare them"""
    max_new_tokens: int = number(512, least=1, most=1_000_000)
    """T, length limit of completions in tokens"""
    temperature: float = number(1.0, above=0)
    """divides the logits, both in sampling and in the loss"""


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """the weights of the reward rules"""

    format_weight: float = number(1.0, least=0)
    """weight of the format rule: a think block, then an answer block, and nothing else"""
    accuracy_weight: float = number(1.0, least=0)
    """weight of the accuracy rule: the correct letter, alone (1) or with other text (0.5)"""
    length_penalty: float = number(0.0, least=0, most=1)
    """share of max_new_tokens, at its end, over which the reward falls by up to 1 (DAPO's soft
    overlong punishment); 0 is off"""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """the objective"""

    inner_updates: int = number(1, least=1)
    """mu, optimiser steps per rollout; with 1 the ratio is exactly 1 and nothing is clipped"""
    clip_low: float = number(0.2, least=0, most=1)
    """the probability ratio is clipped to at least 1 - clip_low"""
    clip_high: float = number(0.2, least=0)
    """the probability ratio is clipped to at most 1 + clip_high"""
    ratio: str = choice("token", "sequence", "detached")
    """the probability ratio: of each "token" (GRPO), of the whole "sequence" (GSPO, meant for
    loss_average = sequence), or of each token but "detached", so that it only weighs the gradient
    (CISPO)"""
    dual_clip: float = number(0.0, least=0)
    """c, above 1: the surrogate of a bad completion counts at most c times; 0 is off"""
    importance_cap: float = number(0.0, least=0)
    """weigh tokens by the trainer's probability over the sampler's, up to this cap, where the two
    differ in their kernels or precision; 0 is off"""
    beta: float = number(0.04, least=0)
    """weight of the KL penalty against the frozen base model; with 0, no reference is loaded"""
    kl: str = choice("k3", "k2", "k1")
    """estimate of the KL divergence: "k3" (GRPO), or "k2", whose gradient is that of the
    divergence, or "k1", whose gradient is zero on average, mere noise"""
    advantage_baseline: str = choice("mean", "leave_one_out", "none")
    """what a reward is compared with: the "mean" of its group (GRPO), the mean of the others
    ("leave_one_out", RLOO), or "none" (REINFORCE)"""
    advantage_scale: str = choice("std", "batch_std", "none")
    """what the difference is divided by: the "std" (standard deviation) of its group (GRPO), that
    of all the step's rewards ("batch_std"), or "none" (Dr. GRPO)"""
    loss_average: str = choice("sequence", "token", "constant")
    """how the loss is averaged: over each "sequence" (GRPO), over all tokens ("token", DAPO) or
    with a "constant" divisor (Dr. GRPO)"""
    mask_truncated: bool = plain(False)
    """leave completions that reached max_new_tokens out of the loss, though not out of their
    group's mean reward (DAPO's overlong filtering; an alternative to length_penalty)"""
    sft_answer: str = choice("tags", "bare", "named")
    """target of "sft": "tags" is <answer>B</answer>, "bare" is B, "named" first gives the option's
    text in a think block, then <answer>B</answer>"""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW"""

    learning_rate: float = number(1e-6, above=0)
    """peak learning rate"""
    warmup_steps: int = number(0, least=0)
    """steps over which the learning rate rises linearly from 0"""
    final_lr_ratio: float = number(1.0, least=0)
    """final learning rate over the peak, with linear decay: 1 is constant, 0 decays to zero"""
    adam_beta1: float = number(0.9, least=0, below=1)
    """decay rate of the mean gradient"""
    adam_beta2: float = number(0.999, least=0, below=1)
    """decay rate of the mean squared gradient"""
    weight_decay: float = number(0.0, least=0)
    """decoupled weight decay"""
    max_grad_norm: float = number(1.0, above=0)
    """larger gradients are scaled down to this norm"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """memory and speed"""

    device: str = plain("cpu", may_change=True)
    """cpu, or cuda"""
    dtype: str = choice("float32", "bfloat16")
    """the model's data type; the optimiser always keeps float32 weights"""
    micro_batch_tokens: int = number(4096, least=1, may_change=True)
    """tokens per forward and backward pass, in whole groups; changes memory and speed, not the
    gradient"""
    activation_checkpointing: bool = plain(False, may_change=True)
    """recompute activations within a block in the backward pass: less memory, more time"""
    shard: bool = plain(False, may_change=True)
    """with several processes, let each keep and update only its share of the fp32 weights, their
    gradients and AdamW's moments"""
    offload_optimizer: bool = plain(False, may_change=True)
    """keep the fp32 weights, their gradients and AdamW's moments in host memory and update them
    there, not on the GPU"""


HEADINGS = (Run, Model, Questions, Measurement, Rollout, Rewards, Loss, Optimizer, Machine)


@dataclass(frozen=True, kw_only=True)
class Config(Machine, Optimizer, Loss, Rewards, Rollout, Measurement, Questions, Model, Run):
    """All settings of a run. Paths are relative to the current folder."""

    def __post_init__(self) -> None:
        for one in fields(self):
            self._require(one.name, *_within_bounds(one, getattr(self, one.name)))
        self._require(
            "warmup_steps", self.warmup_steps <= self.steps, f"at most steps ({self.steps})"
        )
        self._require("max_pixels", self.max_pixels >= self.min_pixels, "at least min_pixels")
        weights = [one.name for one in fields(Rewards) if one.name.endswith("_weight")]
        rewarded = any(getattr(self, name) for name in weights)
        self._require("accuracy_weight", rewarded, "above 0, because all other weights are 0")
        device = re.fullmatch(r"cpu|cuda(:\d+)?", self.device)
        self._require("device", device, "cpu or cuda")
        self._refuse_combinations()

    def _refuse_combinations(self) -> None:
        """Refuse settings that are valid alone and make no sense together."""
        self._require(
            "advantage_scale",
            self.advantage_baseline != "none" or self.advantage_scale != "std",
            "batch_std or none, because with advantage_baseline = none a group of equal rewards "
            "teaches something but has no standard deviation",
        )
        self._require(
            "oversampling",
            self.oversampling == 1 or self.advantage_baseline != "none",
            "1, because with advantage_baseline = none groups of equal rewards teach something",
        )
        self._require("dual_clip", self.dual_clip == 0 or self.dual_clip > 1, "0 or above 1")
        self._require(
            "importance_cap",
            self.importance_cap == 0 or self.importance_cap >= 1,
            "0 or at least 1",
        )
        self._require(
            "importance_cap",
            self.importance_cap == 0 or self.ratio != "sequence",
            "0 with ratio = sequence, because it weighs single tokens",
        )
        self._require(
            "dual_clip",
            self.dual_clip == 0 or self.ratio != "detached",
            "0 with ratio = detached, which has no surrogate to bound",
        )
        self._require(
            "offload_optimizer",
            not (self.offload_optimizer and self.shard),
            "false with shard, which keeps the fp32 weights on the GPUs",
        )

    @property
    def questions_per_step(self) -> int:
        """N and the spare ones; SFT has no use for these."""
        spares = 1 if self.method == "sft" else self.oversampling
        return math.ceil(round(self.prompts_per_step * spares, 6))  # 10 * 1.1 is a little over 11

    @property
    def objective(self) -> dict[str, Any]:
        """The keyword arguments of `grpo_loss` that a config decides."""
        names = ("clip_low", "clip_high", "ratio", "beta", "kl")
        knobs = {name: getattr(self, name) for name in names}
        return knobs | {"dual_clip": self.dual_clip or None}

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
    """Whether a field's value is within its bounds, and the rule in words."""
    if "choices" in field.metadata:
        choices = field.metadata["choices"]
        return value in choices, f"one of {', '.join(choices)}"
    for bound, limit in field.metadata.get("bounds", {}).items():
        holds, words = _BOUNDS[bound]
        if not holds(value, limit):  # false for NaN, whatever the bound
            return False, f"{words} {limit:,}"
    if isinstance(value, str | tuple):
        required = field.default is MISSING and not value
        # A shell may pass any bytes, but config.toml can hold only printable text.
        printable = "".join(value).isprintable()
        return printable and not required, "printable text, and not empty"
    return True, ""


def load_config(
    file: str | Path, overrides: dict[str, Any] | None = None, presets: Sequence[Path] = ()
) -> Config:
    """Read a TOML file; over it go the files of presets in turn, and over these `overrides`.
    InputError names the file and the key.
    """
    known = {one.name: one for one in fields(Config)}
    values = {}
    for source in (file, *presets):
        for key, value in read_toml(source).items():
            if key not in known:
                remedy = "`python train.py --help` lists all keys"
                raise InputError(f"{source}: unknown key {key!r}; {remedy}")
            values[key] = _typed(f"{source}: {key}", known[key].type, value)
    values |= overrides or {}
    for one in known.values():
        if one.default is MISSING and one.name not in values:
            raise InputError(f"{file}: {one.name} is missing; add it, or use --{one.name}")
    return Config(**values)


def read_toml(file: str | Path) -> dict[str, Any]:
    """The keys and values of a config file, with the headings removed."""
    try:
        tables = tomllib.loads(read_bytes(file).decode("utf-8"))
    except OSError as error:
        remedy = "configs/ has examples"
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
    """The resolved config as TOML, with every field."""
    lines = []
    for heading in HEADINGS:
        lines.append(f"[{heading.__name__.lower()}]")
        for one in fields(heading):
            value = json.dumps(getattr(config, one.name), ensure_ascii=False)
            lines.append(f"{one.name} = {value}")
        lines.append("")
    return "\n".join(lines)


def _typed(where: str, kind: Any, value: Any) -> Any:
    """The value, converted to the type of its field: an int to a float, a string to a tuple."""
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return tuple(values)
        raise InputError(f"{where} must be a string or a list of strings")
    if type(value) is int and abs(value) >= 2**63:  # the number may be too long to print
        raise InputError(f"{where} must be a number of at most 63 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        # Ints and lists are not quoted: Python can't print ints of more than 4,300 digits.
        quoted = f", not {value!r}" if isinstance(value, str | bool | float) else ""
        raise InputError(f"{where} must be {kind.__name__}{quoted}")
    return value
