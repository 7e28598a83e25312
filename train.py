"""GRPO for Qwen2-VL: Algorithm 1 of DeepSeekMath (arXiv 2402.03300), as MedVLM-R1 (arXiv 2502.19634) uses it.

    python train.py --config configs/miniature.toml [--steps 20 --run_dir runs/try ...]

Each step draws N questions, samples a group of G answers to each, scores every answer by rules, compares it with its own
group, and raises the probability of the better ones while staying close to the frozen base. Departures from Algorithm 1:
there is no outer loop (the reference is the base model throughout, I = 1), the reward is a rule and not a trained model,
so there is nothing to retrain, and one update per rollout (mu = 1) needs no pass for the old policy. Departures of the parts
stand in grpo/advantages.py and grpo/loss.py.

Letters in names: N prompts, G samples of each, R rules, T completion tokens.
"""

import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import PromptEncoder, Question, choose_questions, questions_of_step, read_questions
from data.vocabulary import load_vocabulary
from evaluation.accuracy import accuracy_by_modality, answer_greedily, comparison_table, run_summary
from grpo.advantages import group_advantages
from grpo.batch import Rollout, completion_logprobs, rollout_logprobs
from grpo.checkpoint import StopRequest, load_checkpoint_model, load_progress, open_run, save_checkpoint
from grpo.config import Config, parse_arguments
from grpo.log import RunLog, step_metrics
from grpo.loss import grpo_loss, token_weights
from grpo.optimizer import MasterAdamW, scheduled_rate
from grpo.sampler import sample_groups, sampling_noise
from model import InputError, Qwen2VL, load_model, save_model
from rewards import RULES, Verdict, score


def train(config: Config) -> None:
    """Run, or resume, what `config` describes; leaves metrics, completions, checkpoints, the model and a summary."""
    resume_from = open_run(config)
    train_questions, test_questions = load_questions(config)
    policy = load_checkpoint_model(config, resume_from) if resume_from else load_model(config.model, config.device, config.dtype)
    reference = load_model(config.model, config.device, config.dtype).requires_grad_(False) if config.beta else None  # line 3
    vocabulary = load_vocabulary(config.model, policy.config, config.device)
    encoder = PromptEncoder(
        vocabulary.tokenizer, image_token_id=policy.config.image_token_id, min_pixels=config.min_pixels,
        max_pixels=config.max_pixels, max_prompt_tokens=config.max_prompt_tokens, too_long=config.too_long,
    )  # fmt: skip
    (train_questions, skipped), (test_questions, _) = encoder.select(train_questions), encoder.select(test_questions)
    if skipped:
        print(f"{skipped} training questions are left out: their prompts are longer than {config.max_prompt_tokens} tokens")
    optimizer = MasterAdamW(
        policy, learning_rate=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    progress = load_progress(resume_from, optimizer) if resume_from else {"step": 0, "seconds": 0.0, "tokens": 0}
    answer = partial(
        answer_greedily, policy, test_questions, encoder, vocabulary,
        max_new_tokens=config.max_new_tokens, batch_prompts=config.eval_batch_prompts,
    )  # fmt: skip
    size = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    print(f"Qwen2-VL of {size:.1f} M parameters, {config.dtype} on {config.device}; {len(train_questions)} questions to train on, "
          f"{len(test_questions)} to test; {config.steps} steps of {config.prompts_per_step} prompts x {config.group_size} samples"
          + (f"; going on from {resume_from}" if resume_from else ""))  # fmt: skip
    if "answers_before" not in progress:
        progress["answers_before"] = answer(label="accuracy before")

    with StopRequest() as stop, RunLog(config.run_dir, progress["step"], config.steps) as log:
        for step in range(progress["step"], config.steps):  # line 4
            started = time.perf_counter()
            prompts = [encoder.encode(q) for q in questions_of_step(train_questions, step, config.prompts_per_step, config.seed)]  # line 5
            rollout = sample_groups(  # lines 6 and 7: pi_old is the policy as it stands; o_1 .. o_G ~ pi_old(. | q)
                policy, prompts, group_size=config.group_size, max_new_tokens=config.max_new_tokens,
                end_ids=vocabulary.end_ids, allowed_V=vocabulary.allowed_V, decode=vocabulary.decode, temperature=config.temperature,
                noise_NGT=sampling_noise(config.seed, step, range(len(prompts)), config.group_size, config.max_new_tokens),
            )  # fmt: skip
            verdicts_NGR, rewards_NGR = score_rollout(rollout, config.device)  # line 8: r_i, here by two rules
            rewards_NG = rewards_NGR @ rewards_NGR.new_tensor([config.format_weight, config.accuracy_weight])
            advantages_NG = group_advantages(rewards_NG, scale=config.advantage_scale)  # line 9: relative to the group

            logprobs_of = partial(rollout_logprobs, rollout=rollout, allowed_V=vocabulary.allowed_V,
                                  temperature=config.temperature, prompts_each=config.micro_batch_prompts)  # fmt: skip
            ref_NGT = logprobs_of(reference) if reference else None
            old_NGT = logprobs_of(policy) if config.inner_updates > 1 else None
            rate = scheduled_rate(step, peak=config.learning_rate, warmup_steps=config.warmup_steps,
                                  steps=config.steps, final_ratio=config.final_lr_ratio)  # fmt: skip
            for _ in range(config.inner_updates):  # line 10: GRPO iteration 1 .. mu
                stats = accumulate_gradient(config, policy, optimizer, rollout, advantages_NG, old_NGT, ref_NGT, vocabulary.allowed_V)
                stats["grad_norm"] = optimizer.step(rate)  # line 11: maximise the objective

            metrics = step_metrics(rollout, rewards_NGR, rewards_NG, RULES) | {name: float(value) for name, value in stats.items()}
            seconds, tokens = time.perf_counter() - started, int(rollout.mask_NGT.sum())
            log.step(step, metrics | {"learning_rate": rate, "seconds": seconds, "tokens_per_second": tokens / seconds})
            log.rollout(step, rollout, verdicts_NGR, advantages_NG.tolist())
            if step % config.log_samples_every == 0:
                log.sample(step, rollout, rewards_NG[0].tolist())
            progress |= {"step": step + 1, "seconds": progress["seconds"] + seconds, "tokens": progress["tokens"] + tokens}
            if stop.asked or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                saved = save_checkpoint(config, policy, optimizer, progress)
            if stop.asked:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; {saved} is whole, and the same command goes on from there")

    save_model(policy, Path(config.run_dir) / "model")
    report(config, test_questions, progress, answer(label="accuracy after"))


def accumulate_gradient(
    config: Config, policy: Qwen2VL, optimizer: MasterAdamW, rollout: Rollout, advantages_NG: Tensor,
    old_NGT: Tensor | None, ref_NGT: Tensor | None, allowed_V: Tensor,
) -> dict[str, Tensor]:
    """Gradient of equation 3 over the whole rollout, a micro-batch of groups at a time; returns the step's statistics."""
    weights_NGT = token_weights(rollout.mask_NGT, average=config.loss_average)  # the divisor, fixed before anything is split
    totals: Counter[str] = Counter()
    for groups, batch, tokens, mask in rollout.micro_batches(config.micro_batch_prompts):
        cut = groups, slice(None), slice(mask.shape[-1])
        weights = weights_NGT[cut]
        logp, entropy = completion_logprobs(policy, batch, tokens, mask, allowed_V, config.temperature)
        loss, stats = grpo_loss(
            logp,
            old=logp.detach() if old_NGT is None else old_NGT[cut],  # one update per rollout: pi_old is pi_theta
            ref=None if ref_NGT is None else ref_NGT[cut],
            advantages=advantages_NG[groups],
            mask=mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            beta=config.beta,
            weights=weights,
        )
        loss.backward()
        optimizer.accumulate()
        gap = (logp.detach() - rollout.logp_NGT[cut]).abs()  # sampler against trainer: nothing but rounding, or a bug
        totals.update(stats | {"loss": loss.detach(), "entropy": (weights * entropy).sum(), "logp_gap": (weights * gap).sum()})
    return totals


def score_rollout(rollout: Rollout, device: str) -> tuple[list[list[tuple[Verdict, ...]]], Tensor]:
    """Every rule's verdict on every completion, and the same as a tensor (N, G, R)."""
    pairs = zip(rollout.prompts, rollout.texts)
    verdicts = [[score(text, prompt.question.answer) for text in texts] for prompt, texts in pairs]
    return verdicts, torch.tensor([[[v.score for v in vs] for vs in group] for group in verdicts], device=device)


def load_questions(config: Config) -> tuple[list[Question], list[Question]]:
    """Training questions, and test questions of all test files by modality, as the config chooses them."""
    folder = config.image_dir or None
    train_questions = choose_questions(
        read_questions(config.train_questions, folder), config.train_modality or None, config.train_count or None, config.seed
    )
    tested = [question for file in config.test_questions for question in read_questions(file, folder)]
    modalities = dict.fromkeys(question.modality for question in tested)
    chosen = [choose_questions(tested, modality, config.test_count or None, config.seed) for modality in modalities]
    return train_questions, [question for part in chosen for question in part]


def report(config: Config, questions: list[Question], progress: dict[str, Any], answers_after: list[str]) -> None:
    """Write summary.json, and print the table that a run ends with."""
    before = accuracy_by_modality(questions, progress["answers_before"])
    after = accuracy_by_modality(questions, answers_after)
    steps, seconds, tokens = (progress[name] for name in ("step", "seconds", "tokens"))
    summary = run_summary(before, after, steps=steps, seconds=seconds, tokens=tokens)
    folder = Path(config.run_dir)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{steps} steps in {seconds:.0f} s, {tokens:,} tokens sampled")
    if after:
        print(f"Greedy accuracy in percent (95 % interval), before and after:\n\n{comparison_table(before, after)}\n")
    print(f"model:  {folder / 'model'}\ncurves: tensorboard --logdir {folder / 'tensorboard'}")


def main() -> int:
    try:
        train(parse_arguments(__doc__.split("\n")[0]))
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"train.py: {stopped or 'stopped'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
