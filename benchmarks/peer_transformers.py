"""Time the same steps with transformers' model and `generate`, copying prompt and image G times.

Takes the arguments of `benchmarks.grpo_step` and prints the same kind of JSON line. The rollout
uses `generate` with its KV cache. Reference and update run whole sequences, one group at a time,
and hold the logits of their completions.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from data import Prompt, load_vocabulary
from data.choice import load_questions, prompt_encoder
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss
from grpo.rollout import collate
from model import read_config
from training.step import Step

from .common import endless, measured, run_measurement, step_config, summary


def repeated(
    prompts: Sequence[Prompt], copies: int, image_token_id: int, device: str
) -> dict[str, Any]:
    """The inputs of transformers' model for `copies` of each prompt and its image."""
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    batch = collate(prompts, device)
    return {
        "input_ids": batch.tokens_NP,
        "attention_mask": torch.ones_like(batch.tokens_NP),
        "mm_token_type_ids": (batch.tokens_NP == image_token_id).long(),
        "pixel_values": batch.images,
        "image_grid_thw": torch.cat([prompt.grids_I3 for prompt in prompts]).to(device),
    }


def logprobs(
    model: Any, inputs: dict[str, Any], completions_GT: Tensor, allowed_V: Tensor
) -> Tensor:
    """log pi of completions (G, T), from whole sequences and their logits."""
    tokens = torch.cat((inputs["input_ids"], completions_GT), dim=1)
    kinds = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(completions_GT)), dim=1)
    whole = inputs | {"input_ids": tokens, "mm_token_type_ids": kinds}
    whole["attention_mask"] = torch.ones_like(tokens)
    # A token is predicted by the state before it: take one position more, and drop the last.
    kept = completions_GT.shape[1] + 1
    logits = model(**whole, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
    # The same distribution as ours: the normaliser excludes ids that can't be sampled.
    logits = logits.masked_fill(~allowed_V, float("-inf"))
    return logits.log_softmax(dim=-1).gather(-1, completions_GT[..., None]).squeeze(-1)


def sampled(policy: Any, inputs: dict[str, Any], allowed_V: Tensor, length: int) -> Tensor:
    """A completion of that length for each row of the inputs, (rows, length)."""
    tokens = policy.generate(
        **inputs,
        do_sample=True,  # from all ids: the checkpoint's own defaults exclude most of them
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        min_new_tokens=length,
        suppress_tokens=(~allowed_V).nonzero()[:, 0].tolist(),
        pad_token_id=0,  # required, but never used
    )
    return tokens[:, -length:]


def measured_steps(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, object]:
    """Like the function of that name in benchmarks/grpo_step.py."""
    config, shape = step_config(checkpoint, folder, args), read_config(checkpoint)
    vocabulary = load_vocabulary(checkpoint, shape, args.device)
    encoder = prompt_encoder(vocabulary, shape, config)
    allowed_V = endless(vocabulary, shape).allowed_V
    load, dtype = Qwen2VLForConditionalGeneration.from_pretrained, getattr(torch, args.dtype)
    policy = load(checkpoint, dtype=dtype).to(args.device)
    reference = load(checkpoint, dtype=dtype).to(args.device) if args.beta else None
    adamw = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    laps = []
    for step in measured(encoder, load_questions(config).train, args):
        one_step(policy, reference, adamw, step, allowed_V, args)
        laps.append(step.seconds)
    return summary(laps, [args.prompts * args.group * args.tokens] * len(laps), args)


def one_step(
    policy: Any,
    reference: Any,
    adamw: torch.optim.Optimizer,
    step: Step,
    allowed_V: Tensor,
    args: argparse.Namespace,
) -> None:
    """Rollout, reference, update and optimiser, with random rewards."""
    inputs = args.group, policy.config.image_token_id, args.device
    groups = [repeated([prompt], *inputs) for prompt in step.prompts]
    with step.phase("rollout"):
        # In one batch: all prompts of the benchmark have the same length.
        tokens = sampled(policy, repeated(step.prompts, *inputs), allowed_V, args.tokens)
    rollouts = list(zip(groups, tokens.split(args.group), strict=True))
    with step.phase("reference"), torch.no_grad():
        refs = [reference and logprobs(reference, *group, allowed_V) for group in rollouts]
    # The cost of a step does not depend on its rewards.
    advantages = group_advantages(torch.rand(args.prompts, args.group)).to(args.device)
    with step.phase("update"):
        for group, ref, advantages_G in zip(rollouts, refs, advantages, strict=True):
            logp = logprobs(policy, *group, allowed_V)
            mask = torch.ones_like(logp, dtype=torch.bool)
            loss, _ = grpo_loss(logp, logp.detach(), ref, advantages_G, mask, beta=args.beta)
            (loss / args.prompts).backward()
    with step.phase("optimizer"):
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()


if __name__ == "__main__":
    sys.exit(run_measurement("peer_transformers", __doc__.split("\n")[0], measured_steps))
