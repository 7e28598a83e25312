"""GRPO for Qwen2-VL: Algorithm 1 of DeepSeekMath (arXiv 2402.03300), as MedVLM-R1 uses it.

    python train.py --config configs/miniature.toml [--steps 20 --run_dir runs/try ...]
    python train.py --config FILE --dry-run                 print the plan of the run, and stop
    python train.py --config configs/miniature_sft.toml     the baseline (training/sft.py)

Each step samples a group of G completions for each of N questions, scores them with rules,
compares each with its own group, and makes the better ones more likely while staying close to the
frozen base. Departures from Algorithm 1: no outer loop (I = 1) and no reward model. mu is
`inner_updates`; with 1, the default, pi_old is pi_theta itself. Variants are knobs of the config.

Suffixes of names: N prompts, G completions of each, T completion tokens (the limit in the noise,
the longest completion in a rollout or micro-batch), V vocabulary.
"""

import sys

from torch import Tensor

from common.config import Config
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss, token_weights, truncated_importance
from grpo.rollout import Rollout, completion_logprobs
from grpo.sampler import sample_groups, sampling_noise
from planning.plan import print_plan
from training.launch import launch
from training.run import Run, rollout_logprobs, smaller_if_memory_is_full
from training.scoring import score_rollout
from training.step import Step


def train(run: Run, config: Config) -> None:
    """Train to the last step of `run`. Lines 1 to 3 are done: pi_theta and pi_ref are loaded."""
    for step in run.steps():  # lines 4 and 5: a batch of questions; `steps` logs and saves
        grpo_step(run, step, config)


def grpo_step(run: Run, step: Step, config: Config) -> None:
    """Lines 6 to 11 for the questions of one step."""
    with step.phase("rollout"):  # lines 6 and 7: o_1 .. o_G ~ pi_old(. | q), the current policy
        places, G, T = step.places, config.group_size, config.max_new_tokens
        noise_NGT = sampling_noise(config.seed, step.number, places, G, T)
        rollout = sample_groups(
            run.policy,
            run.vocabulary,
            step.prompts,
            noise_NGT,
            temperature=config.temperature,
            watch=run.watch,
        )

    with step.phase("rewards"):  # line 8: rewards r_i; line 9: advantages relative to the group
        rollout, verdicts_NG, rewards_NG = score_rollout(step, rollout, config)  # keeps N groups
        baseline, scale = config.advantage_baseline, config.advantage_scale
        advantages_NG = group_advantages(rewards_NG, baseline=baseline, scale=scale)

    with step.phase("reference"):  # log pi_ref for the KL term; with beta = 0 there is no reference
        ref_NGT = rollout_logprobs(run, rollout, run.reference) if run.reference else None
    with step.phase("old policy"):  # log pi_old, fixed before the first of several updates
        # Recomputed by the trainer, not taken from the sampler: the first ratio is exactly 1.
        old_NGT = rollout_logprobs(run, rollout, run.policy) if config.inner_updates > 1 else None

    for iteration in range(config.inner_updates):  # line 10: GRPO iteration = 1 .. mu
        with step.phase("update"):  # line 11: maximise equation 3: its gradient,
            stats = accumulate_gradient(run, rollout, advantages_NG, old_NGT, ref_NGT)
        if iteration == 0:  # no update yet: sampler and trainer differ only by rounding
            stats["sampler_gap"] = stats["policy_gap"]
        with step.phase("optimizer"):  # and one AdamW step
            if not run.apply_gradient(step, stats):
                break  # loss or gradient is not finite: another update would hide it
    step.keep(rollout, verdicts_NG, rewards_NG, advantages_NG, old_NGT, ref_NGT)


@smaller_if_memory_is_full  # retries with smaller micro-batches; the gradient is the same
def accumulate_gradient(
    run: Run,
    rollout: Rollout,
    advantages_NG: Tensor,
    old_NGT: Tensor | None,
    ref_NGT: Tensor | None,
) -> dict[str, Tensor]:
    """Accumulate the gradient of equation 3 over a rollout; returns statistics."""
    config, allowed_V = run.config, run.vocabulary.allowed_V
    # From the whole rollout: averages over micro-batches would make the gradient depend on them.
    average, limit = config.loss_average, config.max_new_tokens
    mask_NGT = rollout.trained_mask(config.mask_truncated)
    weights_NGT = token_weights(mask_NGT, average=average, max_new_tokens=limit)
    totals: dict[str, Tensor] = {}
    for batch in run.micro_batches(rollout):
        logp, entropy = completion_logprobs(run.policy, batch, allowed_V, config.temperature)
        weights, sampled = batch.cut(weights_NGT), batch.cut(rollout.logp_NGT)
        old = logp.detach() if old_NGT is None else batch.cut(old_NGT)  # mu = 1: pi_theta itself
        loss, sums = grpo_loss(
            logp,
            old=old,
            ref=None if ref_NGT is None else batch.cut(ref_NGT),
            advantages=advantages_NG[batch.groups],
            mask=batch.mask_NGT,
            importance=truncated_importance(old, sampled, batch.mask_NGT, config.importance_cap),
            weights=weights,
            **config.objective,  # clip_low, clip_high, ratio, dual_clip, beta, kl
        )
        loss.backward()
        run.optimizer.accumulate()  # in fp32: summing micro-batches in bf16 loses precision

        gap = (logp.detach() - sampled).abs()
        sums |= {"entropy": (weights * entropy).sum(), "policy_gap": (weights * gap).sum()}
        totals["loss"] = totals.get("loss", 0) + loss.detach()
        for name, value in sums.items():  # means: weights may not sum to 1, and if masked even to 0
            totals[name] = totals.get(name, 0) + value / weights_NGT.sum().clamp(min=1e-30)
    return totals


def main() -> int:
    return launch(__doc__, grpo=train, dry_run=print_plan)


if __name__ == "__main__":
    sys.exit(main())
