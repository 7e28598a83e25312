"""A run, in one frozen dataclass: read from a TOML file, overridden on the command line, written
back as resolved.

The docstring under a field is its help text. An unknown key or a value of the wrong type is an
error, never ignored.
"""

import json
import math
import re
import sys
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_bytes


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does. Paths are relative to the folder that the command is
    started in.
    """

    model: str
    """the base model (Qwen2-VL): a folder in Hugging Face layout, or a hub id such as
    Qwen/Qwen2-VL-2B-Instruct
    """
    train_questions: str
    """question file to train on (JSON or JSON lines; see data/readers.py for the dialects)"""
    run_dir: str
    """folder that receives metrics, completions, checkpoints and the trained model"""
    method: str = "grpo"
    """"grpo" learns from rewarded samples, "sft" from the right letters (supervised fine-tuning,
    the baseline)
    """
    test_questions: tuple[str, ...] = ()
    """question files whose accuracy per modality is measured before and after; none skips that"""
    image_dir: str = ""
    """folder that image paths are relative to; empty means each question file's own folder"""
    train_modality: str = ""
    """train on this modality only, such as MRI; empty takes all"""
    train_count: int = 0
    """train on so many questions, drawn with the seed; 0 takes all"""
    test_count: int = 0
    """test on so many questions of each modality, drawn with the seed; 0 takes all"""
    test_fraction: float = 0.0
    """hold out this share of train_questions, whole images at a time, and test on it too"""
    validation_questions: tuple[str, ...] = ()
    """question files to validate on while the run goes on: neither their questions nor their images
    may be trained on
    """
    validation_fraction: float = 0.0
    """hold out this share of train_questions too, whole images at a time, and validate on it"""
    validation_count: int = 0
    """validate on so many questions of each modality, drawn with the seed; 0 takes all"""
    validate_every: int = 50
    """steps between two measurements of greedy accuracy on the validation questions; each is saved
    as a checkpoint
    """
    bad_images: str = "error"
    """what a training image that can't be read does: "error" ends the run, "skip" leaves its
    question out and counts it
    """
    min_pixels: int = 3136
    """smaller images are enlarged to at least so many pixels (paper's run: 56 x 56)"""
    max_pixels: int = 401408
    """larger images are shrunk to at most so many pixels (paper's run: 512 image tokens)"""
    max_prompt_tokens: int = 1024
    """longest prompt, image tokens included; prompts are never truncated"""
    too_long: str = "error"
    """what a longer prompt does: "error" stops the run before it starts, "skip" leaves it out and
    counts it
    """
    seed: int = 0
    """decides the order of questions and every sampled token"""
    steps: int = 300
    """rollouts, each followed by `inner_updates` optimiser steps"""
    prompts_per_step: int = 4
    """N, questions in a step"""
    group_size: int = 8
    """G, completions sampled for each question; a group of one has nothing to be compared with"""
    max_new_tokens: int = 512
    """T, longest completion in tokens"""
    temperature: float = 1.0
    """divides the logits, in sampling and in the loss alike"""
    inner_updates: int = 1
    """mu, optimiser steps on one rollout; with 1 the ratio is exactly 1 and nothing is clipped"""
    clip_low: float = 0.2
    """the probability ratio is clipped below at 1 - clip_low"""
    clip_high: float = 0.2
    """the probability ratio is clipped above at 1 + clip_high"""
    beta: float = 0.04
    """weight of the KL term against the frozen base model; 0 leaves the reference out"""
    advantage_scale: str = "std"
    """"std" divides a group's centred rewards by their spread (GRPO), "none" does not (Dr. GRPO)"""
    loss_average: str = "sequence"
    """what the loss averages over: "sequence" (GRPO), "token" (DAPO), "constant" (Dr. GRPO)"""
    format_weight: float = 1.0
    """weight of the format reward in the sum"""
    accuracy_weight: float = 1.0
    """weight of the accuracy reward in the sum"""
    sft_answer: str = "tags"
    """what "sft" trains on: "tags" is <answer>B</answer>, "bare" is B, "named" thinks the option's
    text, then tags B
    """
    learning_rate: float = 1e-6
    """AdamW's peak learning rate"""
    warmup_steps: int = 0
    """steps over which the learning rate rises from 0"""
    final_lr_ratio: float = 1.0
    """where the learning rate goes by the end, over the peak, linearly: 1 is constant, 0 decays to
    nothing
    """
    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean squared gradient"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to at most this norm"""
    micro_batch_tokens: int = 4096
    """tokens in one forward and backward, whole groups at a time; changes memory and speed, never
    the gradient
    """
    activation_checkpointing: bool = False
    """keep no activations within a block, make them anew in backward: less memory, more time"""
    offload_optimizer: bool = False
    """keep fp32 weights, their gradients and AdamW's moments in the host's memory and update there,
    not on the GPU
    """
    freeze_vision: bool = False
    """leave the vision tower as it is, so that each image is encoded once per step (the paper's run
    trains it)
    """
    eval_batch_prompts: int = 64
    """questions decoded at once when accuracy is measured"""
    save_every: int = 50
    """steps between checkpoints"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept, beside the best on validation: two, in case the newest gets
    damaged
    """
    max_bad_steps: int = 3
    """steps in a row whose loss or gradient is not finite (each is left out and recorded) before
    the run ends
    """
    log_samples_every: int = 10
    """steps between sample images and completions in TensorBoard"""
    dtype: str = "float32"
    """what the model computes in: float32 or bfloat16; the optimiser's weights are float32 in any
    case
    """
    device: str = "cpu"
    """cpu, or cuda"""

    def __post_init__(self) -> None:
        at_least_one = "steps prompts_per_step max_new_tokens inner_updates micro_batch_tokens"
        at_least_one += (
            " eval_batch_prompts save_every log_samples_every min_pixels max_prompt_tokens"
        )
        at_least_one += " validate_every keep_checkpoints max_bad_steps"
        not_negative = "train_count test_count validation_count seed clip_low clip_high beta warmup_steps weight_decay"
        not_negative += " final_lr_ratio"
        not_negative += " adam_beta1 adam_beta2 format_weight accuracy_weight"
        numbers = [field.name for field in fields(self) if field.type is float]
        rules = [(name, math.isfinite(getattr(self, name)), "must be finite") for name in numbers]
        rules += [
            (name, getattr(self, name) != "", "must not be empty")
            for name in ("model", "train_questions", "run_dir")
        ]
        texts = [field.name for field in fields(self) if field.type in (str, tuple[str, ...])]
        rules += [  # joined: a tuple's texts too; no file has such a name, and config.toml could not be written
            (
                name,
                not re.search("[\0\ud800-\udfff]", "".join(getattr(self, name))),
                "must be UTF-8 without NUL",
            )
            for name in texts
        ]
        rules += [
            (name, getattr(self, name) >= 1, "must be at least 1") for name in at_least_one.split()
        ]
        rules += [
            (name, getattr(self, name) >= 0, "must not be negative")
            for name in not_negative.split()
        ]
        rules += [
            (name, getattr(self, name) > 0, "must be above 0")
            for name in ("temperature", "learning_rate", "max_grad_norm")
        ]
        rules += [
            (name, getattr(self, name) in values, f"must be one of {', '.join(values)}")
            for name, values in _CHOICES.items()
        ]
        rules += [
            ("group_size", self.group_size >= 2, "must be at least 2"),
            ("test_fraction", 0 <= self.test_fraction < 1, "must be at least 0 and below 1"),
            (
                "validation_fraction",
                0 <= self.validation_fraction < 1,
                "must be at least 0 and below 1",
            ),
            (
                "warmup_steps",
                self.warmup_steps <= self.steps,
                f"must not exceed steps ({self.steps})",
            ),
            (
                "accuracy_weight",
                self.format_weight + self.accuracy_weight > 0,
                "must not be 0 like format_weight",
            ),
            ("clip_low", self.clip_low <= 1, "must be at most 1"),
            ("adam_beta1", self.adam_beta1 < 1, "must be below 1"),
        ]
        rules += [("adam_beta2", self.adam_beta2 < 1, "must be below 1")]
        rules += [
            ("max_pixels", self.max_pixels >= self.min_pixels, "must not be below min_pixels")
        ]
        rules += [("device", re.fullmatch(r"cpu|cuda(:\d+)?", self.device), "must be cpu or cuda")]
        rules += [
            (name, getattr(self, name) <= most, f"must not exceed {most:,}")
            for name, most in _MOST.items()
        ]
        for name, holds, rule in rules:
            if not holds:
                raise InputError(f"config: {name} is {getattr(self, name)!r}; it {rule}")


_MOST = {
    "steps": 10_000_000,
    "prompts_per_step": 100_000,
    "group_size": 10_000,
    "max_new_tokens": 1_000_000,
}
"""Beyond them there is no run, but a slip of the finger that would fill the memory."""

_CHOICES = {
    "method": ("grpo", "sft"),
    "sft_answer": ("tags", "bare", "named"),
    "too_long": ("error", "skip"),
    "bad_images": ("error", "skip"),
    "advantage_scale": ("std", "none"),
    "loss_average": ("sequence", "token", "constant"),
    "dtype": ("float32", "bfloat16"),
}


def load_config(file: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a TOML file; `overrides` win over it. InputError names the file and the key that is
    wrong.
    """
    try:
        values = tomllib.loads(read_bytes(file).decode("utf-8"))
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{file}: can't read the config ({error.strerror}); configs/ has those that come along"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not TOML ({error}); configs/ has examples") from None
    known = {field.name: field for field in fields(Config)}
    if values.pop("micro_batch_prompts", None):
        print(
            f"{file}: micro_batch_prompts is left out; micro_batch_tokens has taken its place",
            file=sys.stderr,
        )
    for key in values:
        if key not in known:
            raise InputError(
                f"{file}: unknown key {key!r}; `python train.py --help` lists the known ones"
            )
    values = {
        key: _checked(f"{file}: {key}", known[key].type, value) for key, value in values.items()
    } | (overrides or {})
    for field in known.values():
        if field.default is MISSING and field.name not in values:
            raise InputError(f"{file}: {field.name} is missing; add it, or give --{field.name}")
    return Config(**values)


def config_toml(config: Config) -> str:
    """The resolved config, every field, as TOML."""
    lines = (
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in asdict(config).items()
    )
    # DEL is the one character that JSON lets stand and TOML does not.
    return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"


def _checked(where: str, kind: Any, value: Any) -> Any:
    if kind == tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return tuple(values)
        raise InputError(f"{where} must be a string or a list of strings, not {_quoted(value)}")
    if (
        type(value) is int and abs(value) >= 2**63
    ):  # TOML promises no more; too long a number can't even be written
        raise InputError(f"{where} must be a number of at most 63 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} must be {kind.__name__}, not {_quoted(value)}")
    return value


def _quoted(value: Any) -> str:
    return (
        repr(value) if isinstance(value, str | bool | float) else f"of type {type(value).__name__}"
    )
