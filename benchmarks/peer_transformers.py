"""The same steps in the plain way: transformers' model and `generate`, and every prompt and image
copied G times.

Takes the arguments of `benchmarks.grpo_step` and prints a JSON line like its. Rollout by `generate`
with its key-value cache; reference and update run whole sequences, a prompt's group at a time, and
hold the logits of their completions.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from data import Prompt, load_vocabulary, prompts_of_steps
from data.choice import load_questions, prompt_encoder
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss
from grpo.rollout import collate
from model import read_config

from .common import Stopwatch, endless, on_checkpoint, program, step_config, summary


def repeated(prompt: Prompt, copies: int, image_token_id: int, device: str) -> dict[str, Tensor]:
    """The inputs of transformers' model for `copies` of a prompt and its images."""
    batch = collate([prompt] * copies, device)
    return {
        "input_ids": batch.tokens_NP,
        "attention_mask": torch.ones_like(batch.tokens_NP),
        "mm_token_type_ids": (batch.tokens_NP == image_token_id).long(),
        "pixel_values": batch.images,
        "image_grid_thw": batch.grids_I3.to(device),
    }


def logprobs(
    model: torch.nn.Module, inputs: dict[str, Tensor], completions_GT: Tensor, allowed_V: Tensor
) -> Tensor:
    """log pi (G, T) of completions, by whole sequences and their logits."""
    T = completions_GT.shape[1]
    tokens = torch.cat((inputs["input_ids"], completions_GT), dim=1)
    kinds = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(completions_GT)), dim=1)
    whole = inputs | {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": kinds,
    }
    logits = model(**whole, logits_to_keep=T + 1, use_cache=False).logits[:, :-1].float()
    logits = logits.masked_fill(~allowed_V, float("-inf"))
    return logits.log_softmax(dim=-1).gather(-1, completions_GT[..., None]).squeeze(-1)


def measured_steps(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, object]:
    """As the function of that name in benchmarks/grpo_step.py."""
    config = step_config(checkpoint, folder, args)
    shape = read_config(checkpoint)
    vocabulary = load_vocabulary(checkpoint, shape, args.device)
    allowed_V = endless(vocabulary, shape).allowed_V
    load = Qwen2VLForConditionalGeneration.from_pretrained
    policy, reference = (
        load(checkpoint, dtype=getattr(torch, args.dtype)).to(args.device) for _ in range(2)
    )
    adamw = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    laps, steps, encoder = [], range(config.steps), prompt_encoder(vocabulary, shape, config)
    for step, prompts in zip(
        steps, prompts_of_steps(encoder, load_questions(config)[0], steps, args.prompts, 0)
    ):
        clock = Stopwatch(args.device)
        one_step(policy, reference if args.beta else None, adamw, prompts, allowed_V, args, clock)
        laps.append(clock.laps)
        print(f"transformers, step {step}: {clock.total:.2f} s", file=sys.stderr)
    return summary(laps, [args.prompts * args.group * args.tokens] * len(laps), args)


def one_step(
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,
    adamw: torch.optim.Optimizer,
    prompts: list[Prompt],
    allowed_V: Tensor,
    args: argparse.Namespace,
    clock: Stopwatch,
) -> None:
    """Rollout, reference, update and optimiser, with rewards at random."""
    # As one batch: the prompts of the bench are of one length.
    groups = [
        repeated(prompt, args.group, policy.config.image_token_id, args.device)
        for prompt in prompts
    ]
    whole = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
    tokens = policy.generate(
        **whole, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.tokens,
        min_new_tokens=args.tokens, suppress_tokens=(~allowed_V).nonzero()[:, 0].tolist(), pad_token_id=0,
    )[:, -args.tokens :].unflatten(0, (args.prompts, args.group))  # fmt: skip
    clock.lap("rollout")
    with torch.no_grad():
        refs = (
            [logprobs(reference, *part, allowed_V) for part in zip(groups, tokens)]
            if reference
            else []
        )
    clock.lap("reference")
    advantages = group_advantages(torch.rand(args.prompts, args.group)).to(args.device)
    for n, group in enumerate(groups):
        logp = logprobs(policy, group, tokens[n], allowed_V)
        mask = torch.ones_like(logp, dtype=torch.bool)
        ref = refs[n] if reference else None
        loss, _ = grpo_loss(logp, logp.detach(), ref, advantages[n], mask, beta=args.beta)
        (loss / args.prompts).backward()
    clock.lap("update")
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad()
    clock.lap("optimizer")


if __name__ == "__main__":
    sys.exit(
        program(lambda: on_checkpoint(measured_steps, "peer_transformers", __doc__.split("\n")[0]))
    )
