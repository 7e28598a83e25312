"""A step whose loss or gradient was not finite, written down whole, and played again.

    python -m training.incidents runs/NAME/incidents/step-000012

The folder needs nothing from outside: prompts with their patches, completions, rewards and
log-probabilities (batch.safetensors), questions and texts to read (batch.json), and the weights
that the step began with (model/; steps that follow one another share it, since none of them changed
a weight; with several updates per rollout they are those that the step had come to).
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.config import Config
from common.errors import InputError
from data import Prompt, Question, load_vocabulary
from grpo.loss import grpo_loss
from grpo.rollout import Rollout, completion_logprobs
from model import Qwen2VL, load_model, save_model
from model.weights import write_tensors

from .saving import commit

_OF_PROMPT = ("tokens_P", "patches_SC", "grids_I3", "positions_3P")
_SETTINGS = ("clip_low", "clip_high", "beta", "temperature", "dtype", "model")


MOST = 10
"""Steps of a run that are written down whole: each may take as much room as the model."""


def room_for_incident(config: Config) -> bool:
    """Whether one more may be written down."""
    return len(list((Path(config.run_dir) / "incidents").glob("step-*"))) < MOST


def write_incident(
    config: Config,
    step: int,
    policy: Qwen2VL,
    rollout: Rollout,
    judged: dict[str, Tensor],
    stats: dict[str, float],
) -> Path:
    """Write `incidents/step-NNNNNN` in the run's folder and return it.

    Args:
        judged: what the loss took beside the completions, tensors (N, G) or (N, G, T):
            "advantages_NG" and the like; empty for supervised fine-tuning.
        stats: the step's numbers.
    """
    folder = Path(config.run_dir) / "incidents" / f"step-{step:06d}"
    partial, before = folder.with_suffix(".partial"), folder.with_name(f"step-{step - 1:06d}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model = "model"
        if (
            before.is_dir() and config.inner_updates == 1
        ):  # which may itself share the weights of one before
            model = json.loads((before / "batch.json").read_text(encoding="utf-8"))["model"]
            model = f"../{before.name}/model" if model == "model" else model
        else:
            save_model(policy, partial / "model")
        tensors = {
            "tokens_NGT": rollout.tokens_NGT,
            "mask_NGT": rollout.mask_NGT,
            "logp_NGT": rollout.logp_NGT,
            **judged,
        }
        for n, prompt in enumerate(rollout.prompts):
            tensors |= {f"prompt.{n}.{name}": getattr(prompt, name) for name in _OF_PROMPT}
        write_tensors(
            {name: x.detach().cpu().contiguous() for name, x in tensors.items()},
            partial / "batch.safetensors",
        )
        told = {
            "step": step,
            "model": model,
            "stats": {
                name: value if math.isfinite(value) else str(value) for name, value in stats.items()
            },
            "config": {name: getattr(config, name) for name in _SETTINGS},
            "questions": [asdict(prompt.question) for prompt in rollout.prompts],
            "texts": rollout.texts,
        }
        (partial / "batch.json").write_text(
            json.dumps(told, indent=1, ensure_ascii=False, default=str), encoding="utf-8"
        )
        commit(partial, folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def read_incident(folder: Path) -> tuple[dict[str, Any], Rollout, dict[str, Tensor]]:
    """What `write_incident` wrote: batch.json, the rollout, and all tensors by name. InputError if
    it is not whole.
    """
    try:
        told = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "batch.safetensors")
        prompts = []
        for n, fields in enumerate(told["questions"]):
            fields |= {
                "images": tuple(map(Path, fields["images"])),
                "options": tuple(fields["options"]),
            }
            prompts.append(
                Prompt(Question(**fields), *(tensors[f"prompt.{n}.{name}"] for name in _OF_PROMPT))
            )
        shape = tensors["mask_NGT"].shape[:2]
        rollout = Rollout(
            prompts, *(tensors[name] for name in ("tokens_NGT", "mask_NGT", "logp_NGT")),
            torch.ones(shape, dtype=torch.bool), told["texts"],
        )  # fmt: skip
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"{folder}: not the record of a step ({error}); name a folder runs/NAME/incidents/step-..."
        ) from None
    return told, rollout, tensors


def replay(folder: Path) -> list[str]:
    """Loss and gradient of each group of an incident, computed again on the CPU; a line for each,
    and what they mean.
    """
    told, rollout, tensors = read_incident(folder)
    settings = told["config"]
    policy = load_model(folder / told["model"], "cpu", settings["dtype"])
    allowed_V = load_vocabulary(folder / told["model"], policy.config).allowed_V
    lines = [
        f"step {told['step']}: {len(rollout.prompts)} groups of {rollout.mask_NGT.shape[1]}, {settings['dtype']}"
    ]
    lines += [f"{name} holds {int((~x.isfinite()).sum())} numbers that are not finite" for name, x in tensors.items()
              if x.is_floating_point() and not x.isfinite().all()]  # fmt: skip
    for groups, batch, tokens, mask in rollout.micro_batches(1):
        part = groups, slice(None), slice(mask.shape[-1])
        logp, _ = completion_logprobs(
            policy, batch, tokens, mask, allowed_V, settings["temperature"]
        )
        loss = -logp.sum()  # of supervised fine-tuning
        if "advantages_NG" in tensors:
            ref = tensors["ref_NGT"][part] if "ref_NGT" in tensors else None
            old = tensors["old_NGT"][part] if "old_NGT" in tensors else logp.detach()
            knobs = {name: settings[name] for name in ("clip_low", "clip_high", "beta")}
            loss, _ = grpo_loss(logp, old, ref, tensors["advantages_NG"][groups], mask, **knobs)
        loss.backward()
        bad = [
            name
            for name, p in policy.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        policy.zero_grad(set_to_none=True)
        source = rollout.prompts[groups.start].question.source
        told_bad = f"not finite in {len(bad)} tensors, first {bad[0]}" if bad else "finite"
        lines.append(
            f"{source}: lowest log-probability {logp.min():.3g}, loss {loss:.3g}, gradient {told_bad}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.incidents", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="runs/NAME/incidents/step-..., or runs/NAME for the newest one there",
    )
    folder = parser.parse_args().folder
    steps = sorted([*folder.glob("step-*/batch.json"), *folder.glob("incidents/step-*/batch.json")])
    try:
        print("\n".join(replay(steps[-1].parent if steps else folder)))
    except InputError as error:
        print(f"training.incidents: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
