"""Incidents: steps whose loss or gradient was not finite, saved so that they can be replayed.

    python -m training.incidents runs/NAME/incidents/step-000012

The folder is self-contained. batch.safetensors has the prompts with their image patches, the
completions, rewards and log-probabilities; batch.json has the questions and the texts; model/ has
the weights just before the failed update.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from common.config import Config
from common.errors import InputError
from common.files import read_json
from common.program import run_program
from data import Prompt, Question, load_vocabulary
from grpo.loss import grpo_loss
from grpo.rollout import MicroBatch, Rollout, completion_logprobs
from model import Qwen2VL, load_model, save_model
from model.saving import write_tensors

from .checkpoint import damage_of, written_whole
from .step import Step

MOST = 3
"""Maximum number of saved incidents per run: each may take as much disk space as the model."""

_OF_PROMPT = ("tokens_P", "patches_SC", "grids_I3", "positions_3P")
_OF_ROLLOUT = ("tokens_NGT", "mask_NGT", "logp_NGT", "ended_NG")
_REMEDY = "give a folder runs/NAME/incidents/step-..."


def write_incident(config: Config, step: Step, policy: Qwen2VL) -> Path | None:
    """Write `incidents/step-NNNNNN` in the run folder, and return it; None if there are `MOST`."""
    folder = Path(config.run_dir) / "incidents" / f"step-{step.number:06d}"
    if len(list(folder.parent.glob("step-*"))) >= MOST:
        return None
    assert step.rollout is not None  # a step without prompts has no loss
    tensors = {name: getattr(step.rollout, name) for name in _OF_ROLLOUT} | step.tensors
    for n, prompt in enumerate(step.rollout.prompts):
        for name in _OF_PROMPT:
            tensors[f"prompt.{n}.{name}"] = getattr(prompt, name)
    description = {
        "step": step.number,
        "config": asdict(config),
        "questions": [asdict(prompt.question) for prompt in step.rollout.prompts],
        "texts": step.rollout.texts,
    }
    # default=str: a question's images are paths.
    text = json.dumps(description, indent=1, ensure_ascii=False, default=str)
    with written_whole(folder) as partial:
        save_model(policy, partial / "model")
        # Safetensors can't write views, and a prompt's positions may be a slice of a larger tensor.
        plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        write_tensors(plain, partial / "batch.safetensors")
        (partial / "batch.json").write_text(text, encoding="utf-8")
    return folder


def read_incident(folder: Path) -> tuple[dict[str, Any], Rollout, dict[str, Tensor]]:
    """Returns batch.json, the rollout, and all tensors by name. InputError if a file is damaged."""
    damage = damage_of(folder)
    if damage:
        raise InputError(f"{folder}: not an intact incident folder ({damage}); {_REMEDY}")
    description = read_json(folder / "batch.json", _REMEDY)
    tensors = load_file(folder / "batch.safetensors")
    prompts = []
    for n, fields in enumerate(description["questions"]):
        of_prompt = [tensors[f"prompt.{n}.{name}"] for name in _OF_PROMPT]
        prompts.append(Prompt(Question(**fields), *of_prompt))
    tokens_NGT, mask_NGT, logp_NGT, ended_NG = (tensors[name] for name in _OF_ROLLOUT)
    texts = description["texts"]
    rollout = Rollout(prompts, tokens_NGT, mask_NGT, logp_NGT, ended_NG, texts)
    return description, rollout, tensors


def replay(folder: Path) -> list[str]:
    """Recompute the loss and gradient of each group on the CPU. Returns the report's lines."""
    description, rollout, tensors = read_incident(folder)
    config = Config(**description["config"])
    policy = load_model(folder / "model", "cpu", config.dtype)
    allowed_V = load_vocabulary(folder / "model", policy.config).allowed_V
    size = f"{len(rollout.prompts)} groups of {rollout.mask_NGT.shape[1]}"
    lines = [f"step {description['step']}: {size}, {config.dtype}"]
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            lines.append(f"{name} has {int((~x.isfinite()).sum())} values that are not finite")
    for batch in rollout.micro_batches(1):  # one group each
        temperature = config.temperature if config.method == "grpo" else 1.0
        logp, _ = completion_logprobs(policy, batch, allowed_V, temperature)
        loss = _loss(logp, batch, tensors, config)
        loss.backward()
        bad = []
        for name, param in policy.named_parameters():
            if param.grad is not None and not param.grad.isfinite().all():
                bad.append(name)
        policy.zero_grad(set_to_none=True)
        source = rollout.prompts[batch.groups.start].question.source
        gradient = f"not finite in {len(bad)} tensors, first {bad[0]}" if bad else "finite"
        numbers = f"lowest log-probability {logp.min():.3g}, loss {loss:.3g}"
        lines.append(f"{source}: {numbers}, gradient {gradient}")
    return lines


def _loss(logp: Tensor, batch: MicroBatch, tensors: dict[str, Tensor], config: Config) -> Tensor:
    """The loss of a single group, averaged per sequence and without importance weights: enough to
    find which is not finite.
    """
    if config.method == "sft":
        return -logp.sum()
    loss, _ = grpo_loss(
        logp,
        old=batch.cut(tensors["old_NGT"]) if "old_NGT" in tensors else logp.detach(),
        ref=batch.cut(tensors["ref_NGT"]) if "ref_NGT" in tensors else None,
        advantages=tensors["advantages_NG"][batch.groups],
        mask=batch.mask_NGT,
        **config.objective,
    )
    return loss


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.incidents", description=__doc__.split("\n")[0]
    )
    folder_help = "runs/NAME/incidents/step-..., or runs/NAME for the newest one there"
    parser.add_argument("folder", type=Path, help=folder_help)
    folder = parser.parse_args().folder
    steps = sorted([*folder.glob("step-*/batch.json"), *folder.glob("incidents/step-*/batch.json")])
    newest = steps[-1].parent if steps else folder
    return run_program("training.incidents", lambda: print("\n".join(replay(newest))))


if __name__ == "__main__":
    sys.exit(main())
