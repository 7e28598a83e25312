"""GRPO for Qwen2-VL: Algorithm 1 of DeepSeekMath (arXiv 2402.03300), as MedVLM-R1 (arXiv
2502.19634) uses it.

    python train.py --config configs/miniature.toml [--steps 20 --run_dir runs/try ...] python
    train.py --config FILE --dry-run                 what that would take, without doing it:
    planning/plan.py python train.py --config configs/miniature_sft.toml     the baseline,
    supervised fine-tuning: training/sft.py

Each step draws N questions, samples a group of G answers to each, scores every answer by rules,
compares it with its own group, and raises the probability of the better ones while staying close to
the frozen base. Departures from Algorithm 1: there is no outer loop (the reference is the base
model throughout, I = 1); the reward is rules and no trained model, so there is none to retrain; one
update per rollout (mu = 1) needs no pass for the old policy. Departures of the parts stand in
grpo/advantages.py and grpo/loss.py.

Letters in names: N prompts, G samples of each, R rules, T completion tokens.
"""

import json
import signal
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while the libraries load, which takes seconds, is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch import Tensor

from common.command_line import parse_arguments
from common.config import Config
from common.errors import InputError
from common.terminal import patient_output, said
from data import Prompt
from evaluation.accuracy import accuracy_by_modality, comparison_table, run_summary, tally
from evaluation.answers import answer_greedily
from evaluation.audits.blind import blind_credits, by_modality
from evaluation.statistics import wilson
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss, token_weights
from grpo.optimizer import scheduled_rate
from grpo.rollout import (
    Rollout,
    StepRecord,
    completion_logprobs,
    rollout_logprobs,
    with_image_features,
)
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL, save_model
from planning.plan import print_plan
from rewards import Verdict, score
from training.log import Stopwatch
from training.run import Run, prepare
from training.session import Session
from training.sft import fine_tune
from training.stop import Stopped, stop_at_once


def train(session: Session, run: Run, config: Config) -> None:
    """GRPO from where `run` stands to its last step; leaves metrics, completions and
    checkpoints.
    """
    # Lines 1 to 3: policy and frozen reference both begin as the base model.
    for step, prompts, clock in session:  # lines 4 and 5: a batch of questions
        that = grpo_step(run, config, step, prompts, clock)
        session.log.step(step, that, clock)
        if step % config.log_samples_every == 0:
            session.log.sample(step, that)
        session.end_step(step, clock, that.rollout, that.stats, that.judged)


def grpo_step(
    run: Run, config: Config, step: int, prompts: list[Prompt], clock: Stopwatch
) -> StepRecord:
    """Lines 6 to 11 for the questions of one step."""
    policy, allowed_V = run.policy, run.vocabulary.allowed_V
    weights_R = torch.tensor([config.format_weight, config.accuracy_weight])  # rewards.RULES

    if config.freeze_vision:  # then all models and passes of the step see the same
        prompts = with_image_features(policy, prompts)
        clock.lap("vision")

    # lines 6 and 7: pi_old is the policy as it stands; sample o_1 .. o_G ~ pi_old(. | q) for each
    # question
    noise_NGT = sampling_noise(
        config.seed, step, range(len(prompts)), config.group_size, config.max_new_tokens
    )
    rollout = sample_groups(
        policy,
        run.vocabulary,
        prompts,
        noise_NGT,
        temperature=config.temperature,
        watch=lambda _: run.stop.check(),
    )
    clock.lap("rollout")

    # line 8: the rewards r_i; line 9: advantages relative to the group
    verdicts_NGR, rewards_NGR = score_rollout(rollout)
    rewards_NG = (rewards_NGR @ weights_R).to(config.device)
    advantages_NG = group_advantages(rewards_NG, scale=config.advantage_scale)
    clock.lap("rewards")

    def logprobs_of(model: Qwen2VL) -> Tensor:
        parts = partial(run.micro_batches, rollout)
        return run.fitted(
            rollout,
            lambda: rollout_logprobs(model, rollout, parts(), allowed_V, config.temperature),
        )

    ref_NGT = logprobs_of(run.reference) if run.reference is not None else None
    clock.lap("reference")
    # Not the sampler's log-probabilities: the trainer's own, so that the first ratio is exactly 1.
    old_NGT = logprobs_of(policy) if config.inner_updates > 1 else None
    clock.lap("old policy")
    rate = scheduled_rate(step, config)
    for update in range(config.inner_updates):  # line 10: GRPO iteration = 1 .. mu
        stats = run.fitted(
            rollout,
            lambda: accumulate_gradient(run, rollout, advantages_NG, old_NGT, ref_NGT, config),
        )
        clock.lap("update")
        if update == 0:  # sampler against trainer before anything has moved: rounding, or a bug
            sampler_gap = stats["policy_gap"]
        stats |= run.update(rate, stats["loss"])  # line 11: maximise the objective, equation 3
        clock.lap("optimizer")
        if (
            "bf16_lost" not in stats
        ):  # it was not finite, and no update: another one would hide that
            break
    stats |= {"sampler_gap": sampler_gap, "learning_rate": rate}
    return StepRecord(rollout, verdicts_NGR, rewards_NG, advantages_NG, old_NGT, ref_NGT, stats)


def accumulate_gradient(
    run: Run,
    rollout: Rollout,
    advantages_NG: Tensor,
    old_NGT: Tensor | None,
    ref_NGT: Tensor | None,
    config: Config,
) -> dict[str, Tensor]:
    """Gradient of equation 3 over the whole rollout, a micro-batch of groups at a time; returns its
    statistics.
    """
    # The divisor of the loss, fixed before anything is split.
    weights_NGT = token_weights(
        rollout.mask_NGT, average=config.loss_average, max_new_tokens=config.max_new_tokens
    )
    totals: dict[str, Tensor] = defaultdict(lambda: weights_NGT.new_zeros(()))
    for groups, batch, tokens, mask in run.micro_batches(rollout):
        part = groups, slice(None), slice(mask.shape[-1])
        logp, entropy = completion_logprobs(
            run.policy, batch, tokens, mask, run.vocabulary.allowed_V, config.temperature
        )
        loss, stats = grpo_loss(
            logp,
            old=logp.detach()
            if old_NGT is None
            else old_NGT[part],  # one update per rollout: pi_old is pi_theta
            ref=None if ref_NGT is None else ref_NGT[part],
            advantages=advantages_NG[groups],
            mask=mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            beta=config.beta,
            weights=weights_NGT[part],
        )
        loss.backward()
        run.optimizer.accumulate()
        gap = (logp.detach() - rollout.logp_NGT[part]).abs()
        stats |= {
            "entropy": (weights_NGT[part] * entropy).sum(),
            "policy_gap": (weights_NGT[part] * gap).sum(),
        }
        totals["loss"] += loss.detach()
        for name, value in stats.items():
            totals[name] += (
                value / weights_NGT.sum()
            )  # means over tokens, whatever the weights add up to
    return totals


def score_rollout(rollout: Rollout) -> tuple[list[list[tuple[Verdict, ...]]], Tensor]:
    """Every rule's verdict on every completion, and their scores as a tensor (N, G, R)."""
    groups = zip(rollout.prompts, rollout.texts, strict=True)
    asked = ((prompt.question, texts) for prompt, texts in groups)
    verdicts = [[score(text, question.answer) for text in texts] for question, texts in asked]
    scores = [[[verdict.score for verdict in rules] for rules in group] for group in verdicts]
    return verdicts, torch.tensor(scores)


def measured(run: Run, config: Config) -> None:
    """The run that `config` describes, begun or resumed, between two measurements of accuracy.

    Leaves the model, summary.json and what the method leaves; prints the table that a run ends
    with.
    """
    folder, questions, progress = Path(config.run_dir), run.test_questions, run.progress
    answer = partial(answer_greedily, run.policy, run.vocabulary, run.encoder, config=config)
    if "answers_before" not in progress:
        progress["answers_before"] = answer(questions, label="accuracy before")
    asked = run.validation_questions

    def validate() -> tuple[int, int]:
        found = tally([question.answer for question in asked], answer(asked, label="validation"))
        return found.right, found.total

    with Session(run, config, validate if asked else None) as session:
        {"grpo": train, "sft": fine_tune}[config.method](session, run, config)
    save_model(run.policy, folder / "model")

    before = accuracy_by_modality(questions, progress["answers_before"])
    after = accuracy_by_modality(questions, answer(questions, label="accuracy after"))
    blind = by_modality(questions, blind_credits(run.train_questions, questions))
    steps, seconds, tokens = (progress[name] for name in ("step", "seconds", "tokens"))
    summary = run_summary(before, after, blind, steps=steps, seconds=seconds, tokens=tokens)
    summary |= {"validation": progress["best"]} if "best" in progress else {}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{steps} steps in {seconds:.0f} s, {tokens:,} completion tokens")
    print_end(run, session, folder)
    if after:
        print(
            f"Greedy accuracy in percent (95 % interval):\n\n{comparison_table(before, after, blind)}\n"
        )
    print(f"model:  {folder / 'model'}\ncurves: tensorboard --logdir {folder / 'tensorboard'}")


def print_end(run: Run, session: Session, folder: Path) -> None:
    """What the person who comes back should know first: what went wrong on the way, and the best on
    validation.
    """
    for kind, count in session.log.kinds.items():
        print(f"incidents: {count} of kind {kind!r}, see {folder / 'incidents.jsonl'}")
    if best := run.progress.get("best"):
        asked = run.validation_questions
        guesses = by_modality(asked, blind_credits(run.train_questions, asked))
        counts = Counter(question.modality for question in asked)
        blind = max(
            sum(rates[m] * n for m, n in counts.items()) for rates in guesses.values()
        ) / len(asked)
        low, high = wilson(best["right"], best["total"])
        checkpoint = folder / "checkpoints" / f"step-{best['step']:06d}"
        print(
            f"validation: best {best['right'] / best['total']:.1%} of {best['total']} ({low:.1%} to {high:.1%}; the best "
            f"guess without the image {blind:.1%}) after {best['step']} steps: {checkpoint}"
        )


def main() -> int:
    """Exit codes: 0 done; 2 something must be mended, as the one line says; 130, 143 or 129 stopped
    by Ctrl-C, SIGTERM or SIGHUP, with a checkpoint of the last whole step.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop_at_once)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, stop_at_once)
    with patient_output():
        return run_program()


def run_program() -> int:
    """What the command line asks for, and its exit code."""
    try:
        config, dry_run = parse_arguments(__doc__.split("\n")[0])
        if dry_run:
            print_plan(config)
        else:
            run = prepare(config)
            with run.claim:
                measured(run, config)
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"train.py: {said(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(
            "train.py: stopped at once; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
