"""GRPO for Qwen2-VL: Algorithm 1 of DeepSeekMath (arXiv 2402.03300), as MedVLM-R1 (arXiv 2502.19634) uses it.

    python train.py --config configs/miniature.toml [--steps 20 --run_dir runs/try ...]
    python train.py --config configs/miniature_sft.toml     the baseline, supervised fine-tuning: grpo/sft.py

Each step draws N questions, samples a group of G answers to each, scores every answer by rules, compares it with its
own group, and raises the probability of the better ones while staying close to the frozen base. Departures from
Algorithm 1: there is no outer loop (the reference is the base model throughout, I = 1); the reward is rules and no
trained model, so there is none to retrain; one update per rollout (mu = 1) needs no pass for the old policy. Departures
of the parts stand in grpo/advantages.py and grpo/loss.py.

Letters in names: N prompts, G samples of each, R rules, T completion tokens.
"""

import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import Prompt, prompts_of_steps
from evaluation.accuracy import accuracy_by_modality, comparison_table, run_summary
from evaluation.answers import answer_greedily
from evaluation.blind import blind_credits, by_modality
from grpo.advantages import group_advantages
from grpo.batch import Rollout, completion_logprobs, rollout_logprobs, with_image_features
from grpo.checkpoint import StopRequest, end_step
from grpo.command_line import parse_arguments
from grpo.config import Config
from grpo.log import RunLog, Stopwatch
from grpo.loss import grpo_loss, token_weights
from grpo.optimizer import MasterAdamW, scheduled_rate
from grpo.run import Run, prepare
from grpo.sampler import sample_groups, sampling_noise
from grpo.sft import fine_tune
from model import InputError, Qwen2VL, save_model
from rewards import Verdict, score


def train(run: Run, config: Config) -> None:
    """GRPO from where `run` stands to its last step; leaves metrics, completions and checkpoints."""
    # Lines 1 to 3: policy and frozen reference both begin as the base model.
    progress, steps = run.progress, range(run.progress["step"], config.steps)
    prompts_of_step = prompts_of_steps(run.encoder, run.train_questions, steps, config.prompts_per_step, config.seed)
    with StopRequest() as stop, RunLog(config.run_dir, config.method, progress["step"], config.steps) as log:
        for step in steps:  # line 4
            clock = Stopwatch(config.device)
            prompts = next(prompts_of_step)  # line 5: sample a batch of questions
            clock.lap("prompts")
            rollout, verdicts_NGR, rewards_NG, advantages_NG, stats = grpo_step(run, config, step, prompts, clock)
            log.step(step, rollout, verdicts_NGR, rewards_NG, advantages_NG, stats, clock)
            if step % config.log_samples_every == 0:
                log.sample(step, rollout, rewards_NG)
            progress["step"] = step + 1
            progress["seconds"] += clock.total
            progress["tokens"] += int(rollout.mask_NGT.sum())
            end_step(config, run.policy, run.optimizer, progress, stop)


def grpo_step(
    run: Run, config: Config, step: int, prompts: list[Prompt], clock: Stopwatch
) -> tuple[Rollout, list[list[tuple[Verdict, ...]]], Tensor, Tensor, dict[str, Tensor]]:
    """Lines 6 to 11 for the questions of one step: rollout, verdicts, rewards (N, G), advantages (N, G), statistics."""
    policy, optimizer, allowed_V = run.policy, run.optimizer, run.vocabulary.allowed_V
    weights_R = torch.tensor([config.format_weight, config.accuracy_weight, config.consistency_weight])  # rewards.RULES

    if config.freeze_vision:  # then all models and passes of the step see the same
        prompts = with_image_features(policy, prompts)
        clock.lap("vision")

    # lines 6 and 7: pi_old is the policy as it stands; sample o_1 .. o_G ~ pi_old(. | q) for each question
    noise_NGT = sampling_noise(config.seed, step, range(len(prompts)), config.group_size, config.max_new_tokens)
    rollout = sample_groups(policy, run.vocabulary, prompts, noise_NGT, temperature=config.temperature)
    clock.lap("rollout")

    # line 8: the rewards r_i; line 9: advantages relative to the group
    verdicts_NGR, rewards_NGR = score_rollout(rollout)
    rewards_NG = (rewards_NGR @ weights_R).to(config.device)
    advantages_NG = group_advantages(rewards_NG, scale=config.advantage_scale)
    clock.lap("rewards")

    logprobs_of = partial(rollout_logprobs, rollout=rollout, allowed_V=allowed_V, config=config)
    ref_NGT = logprobs_of(run.reference) if run.reference is not None else None
    clock.lap("reference")
    # Not the sampler's log-probabilities: the trainer's own, so that the first ratio is exactly 1.
    old_NGT = logprobs_of(policy) if config.inner_updates > 1 else None
    clock.lap("old policy")
    rate = scheduled_rate(step, config)
    for update in range(config.inner_updates):  # line 10: GRPO iteration = 1 .. mu
        stats = accumulate_gradient(policy, optimizer, rollout, advantages_NG, old_NGT, ref_NGT, allowed_V, config)
        clock.lap("update")
        if update == 0:  # sampler against trainer before anything has moved: rounding, or a bug
            sampler_gap = stats["policy_gap"]
        stats |= optimizer.step(rate)  # line 11: maximise the objective, equation 3
        clock.lap("optimizer")
    return rollout, verdicts_NGR, rewards_NG, advantages_NG, stats | {"sampler_gap": sampler_gap, "learning_rate": rate}


def accumulate_gradient(
    policy: Qwen2VL,
    optimizer: MasterAdamW,
    rollout: Rollout,
    advantages_NG: Tensor,
    old_NGT: Tensor | None,
    ref_NGT: Tensor | None,
    allowed_V: Tensor,
    config: Config,
) -> dict[str, Tensor]:
    """Gradient of equation 3 over the whole rollout, a micro-batch of groups at a time; returns its statistics."""
    # The divisor of the loss, fixed before anything is split.
    weights_NGT = token_weights(rollout.mask_NGT, average=config.loss_average, max_new_tokens=config.max_new_tokens)
    totals: dict[str, Tensor] = defaultdict(lambda: weights_NGT.new_zeros(()))
    for groups, batch, tokens, mask in rollout.micro_batches(config.micro_batch_tokens):
        part = groups, slice(None), slice(mask.shape[-1])
        logp, entropy = completion_logprobs(policy, batch, tokens, mask, allowed_V, config.temperature)
        loss, stats = grpo_loss(
            logp,
            old=logp.detach() if old_NGT is None else old_NGT[part],  # one update per rollout: pi_old is pi_theta
            ref=None if ref_NGT is None else ref_NGT[part],
            advantages=advantages_NG[groups],
            mask=mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            beta=config.beta,
            weights=weights_NGT[part],
        )
        loss.backward()
        optimizer.accumulate()
        gap = (logp.detach() - rollout.logp_NGT[part]).abs()
        stats |= {"entropy": (weights_NGT[part] * entropy).sum(), "policy_gap": (weights_NGT[part] * gap).sum()}
        totals["loss"] += loss.detach()
        for name, value in stats.items():
            totals[name] += value / weights_NGT.sum()  # means over tokens, whatever the weights add up to
    return totals


def score_rollout(rollout: Rollout) -> tuple[list[list[tuple[Verdict, ...]]], Tensor]:
    """Every rule's verdict on every completion, and their scores as a tensor (N, G, R)."""
    groups = zip(rollout.prompts, rollout.texts, strict=True)
    asked = ((prompt.question, texts) for prompt, texts in groups)
    verdicts = [[score(text, question.answer, question.options) for text in texts] for question, texts in asked]
    scores = [[[verdict.score for verdict in rules] for rules in group] for group in verdicts]
    return verdicts, torch.tensor(scores)


def measured(config: Config) -> None:
    """The run that `config` describes, begun or resumed, between two measurements of accuracy.

    Leaves the model, summary.json and what the method leaves; prints the table that a run ends with.
    """
    run = prepare(config)
    folder, questions, progress = Path(config.run_dir), run.test_questions, run.progress
    answer = partial(answer_greedily, run.policy, run.vocabulary, run.encoder, questions, config=config)
    if "answers_before" not in progress:
        progress["answers_before"] = answer(label="accuracy before")
    {"grpo": train, "sft": fine_tune}[config.method](run, config)
    save_model(run.policy, folder / "model")

    before = accuracy_by_modality(questions, progress["answers_before"])
    after = accuracy_by_modality(questions, answer(label="accuracy after"))
    blind = by_modality(questions, blind_credits(run.train_questions, questions))
    steps, seconds, tokens = (progress[name] for name in ("step", "seconds", "tokens"))
    summary = run_summary(before, after, blind, steps=steps, seconds=seconds, tokens=tokens)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{steps} steps in {seconds:.0f} s, {tokens:,} completion tokens")
    if after:
        print(f"Greedy accuracy in percent (95 % interval):\n\n{comparison_table(before, after, blind)}\n")
    print(f"model:  {folder / 'model'}\ncurves: tensorboard --logdir {folder / 'tensorboard'}")


def main() -> int:
    try:
        measured(parse_arguments(__doc__.split("\n")[0]))
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"train.py: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
