"""A training step written out plainly: the slow twin that our runs are compared with.

GRPO is Algorithm 1 of DeepSeekMath (arXiv 2402.03300) with equations 3 and 4. The other knobs are
those of DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783), GSPO (arXiv 2507.18071), CISPO (arXiv
2506.13585), RLOO (arXiv 2402.14740) and dual-clip PPO (arXiv 1912.09729). The policy is
transformers' own Qwen2-VL. Every completion runs alone after its whole prompt, all logits are kept,
and plain autograd and AdamW do the rest. The twin imports none of our code: it gets the sampled
completions and the fields of the config.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration


class Group(NamedTuple):
    """A question and its completions, each up to and including its end of turn."""

    prompt: list[int]
    patches: Tensor
    grids: Tensor
    letter: str
    option: str
    completions: list[list[int]]
    sampled_logps: list[Tensor]


@dataclass
class Outcome:
    """The results of a step; `scores`, `advantages` and `texts` by group and completion."""

    texts: list[list[str]] = field(default_factory=list)
    scores: list[list[tuple[float, ...]]] = field(default_factory=list)
    advantages: list[list[float]] = field(default_factory=list)
    # One dict per update, before clipping.
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    clipped_below: int = 0
    clipped_above: int = 0
    dual_clipped: int = 0
    capped: int = 0  # importance weights, at their cap
    ratio_margin: float = math.inf  # smallest distance of a ratio from the edge of the clip range


RULES = ("format", "accuracy")


def rule_scores(text: str, letter: str) -> tuple[float, float]:
    """Scores that differ between random texts; the second depends on the question."""
    vowels = sum(character in "aeiou" for character in text) / max(1, len(text))
    return vowels, float(letter in text or len(text) % 3 == 0)


class StepTwin:
    """The policy, its frozen base and its optimiser. `knobs` has the fields of a run's config."""

    def __init__(
        self, folder: Path, allowed_ids: list[int], end_ids: list[int], knobs: SimpleNamespace
    ) -> None:
        self.policy, self.reference = load(folder), load(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.allowed_ids, self.end_ids, self.knobs = allowed_ids, end_ids, knobs
        if knobs.freeze_vision:
            self.policy.model.visual.requires_grad_(False)
        self.trained = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        self.adamw = torch.optim.AdamW(
            self.trained.values(),
            betas=(knobs.adam_beta1, knobs.adam_beta2),
            eps=1e-8,
            weight_decay=knobs.weight_decay,
            foreach=False,
            fused=False,
        )

    def grpo_step(self, step: int, groups: list[Group]) -> Outcome:
        """Lines 6 to 11 of Algorithm 1, except for the sampling."""
        knobs, outcome = self.knobs, Outcome()
        rewards = [self.score(group, outcome) for group in groups]
        outcome.advantages = [advantages(group, rewards, knobs) for group in rewards]

        # Line 3: the reference is the base. Line 6: the old policy is the current policy.
        with torch.no_grad():
            ref = [self.logprobs_of_group(self.reference, group) for group in groups]
            old = [self.logprobs_of_group(self.policy, group) for group in groups]

        outcome.lengths = [len(o) for group in groups for o in group.completions]
        for update in range(knobs.inner_updates):  # line 10
            means = self.accumulate(groups, outcome, old, ref)
            if update == 0:  # before the first update, sampler and trainer differ only by rounding
                sampler_gap = means["policy_gap"]
            means |= self.update(step, outcome)  # line 11
        outcome.metrics = rollout_metrics(outcome, rewards, groups, self.end_ids) | means
        outcome.metrics["sampler_gap"] = sampler_gap
        return outcome

    def score(self, group: Group, outcome: Outcome) -> list[float]:
        """The rewards r_i of a group (line 8): the weighted scores of its texts."""
        knobs = self.knobs
        weights = knobs.format_weight, knobs.accuracy_weight
        texts = []
        for completion in group.completions:
            ended = completion[-1] in self.end_ids
            texts.append(self.tokenizer.decode(completion[:-1] if ended else completion))
        scores = [rule_scores(text, group.letter) for text in texts]
        outcome.texts.append(texts)
        outcome.scores.append(scores)
        rewards = [sum(w * s for w, s in zip(weights, row, strict=True)) for row in scores]
        for i, completion in enumerate(group.completions):
            if knobs.length_penalty:
                rewards[i] += overlong_reward(len(completion), knobs)
        return rewards

    def accumulate(
        self,
        groups: list[Group],
        outcome: Outcome,
        old: list[list[Tensor]],
        ref: list[list[Tensor]],
    ) -> dict[str, float]:
        """Accumulate the gradient of minus equation 3. Returns the loss and means over tokens."""
        knobs = self.knobs
        low, high = 1 - knobs.clip_low, 1 + knobs.clip_high
        loss, weight_sum, sums = 0.0, 0.0, defaultdict(float)
        completions = [o for group in groups for o in group.completions]
        trained = [len(o) if self.is_trained(o) else 0 for o in completions]
        for n, group in enumerate(groups):
            for i, completion in enumerate(group.completions):
                A = outcome.advantages[n][i]
                weight = 0.0
                if self.is_trained(completion):
                    weight = token_weight(len(completion), trained, knobs)
                logp_T, entropy_T = self.logprobs(self.policy, group, completion, knobs.temperature)
                ratio_T = (logp_T - old[n][i]).exp()
                if knobs.ratio == "sequence":  # GSPO: (prod_t ratio_t) ^ (1 / |o_i|)
                    ratio_T = (logp_T - old[n][i]).mean().exp() * torch.ones(len(completion))
                unclipped_T = ratio_T * A
                clipped_T = ratio_T.clamp(low, high) * A
                surrogate_T = torch.min(unclipped_T, clipped_T)
                cut_T = clipped_T < unclipped_T  # the clip removes the gradient of these tokens
                if knobs.dual_clip and A < 0:
                    bounded_T = surrogate_T < knobs.dual_clip * A
                    outcome.dual_clipped += int(bounded_T.sum()) if weight else 0
                    cut_T = cut_T | bounded_T
                    surrogate_T = surrogate_T.clamp(min=knobs.dual_clip * A)
                if knobs.ratio == "detached":  # CISPO
                    surrogate_T = clipped_T.detach() * logp_T
                    cut_T = (ratio_T < low) | (ratio_T > high)
                if knobs.importance_cap:
                    importance_T = (old[n][i] - group.sampled_logps[i]).exp()
                    outcome.capped += int((importance_T > knobs.importance_cap).sum())
                    surrogate_T = surrogate_T * importance_T.clamp(max=knobs.importance_cap)
                ref_ratio_T = (ref[n][i] - logp_T).exp()
                kl_T = {
                    "k1": -ref_ratio_T.log(),
                    "k2": ref_ratio_T.log() ** 2 / 2,
                    "k3": ref_ratio_T - ref_ratio_T.log() - 1,  # equation 4
                }[knobs.kl]
                objective = weight * (surrogate_T - knobs.beta * kl_T).sum()  # o_i in equation 3
                (-objective).backward()
                loss -= objective.item()

                gap_T = (logp_T - group.sampled_logps[i]).abs()
                values = {"ratio": ratio_T, "entropy": entropy_T, "policy_gap": gap_T}
                values |= {
                    "clipped_low": cut_T * (ratio_T < 1),
                    "clipped_high": cut_T * (ratio_T > 1),
                }
                if knobs.beta:
                    values["kl"] = kl_T
                for name, value_T in values.items():
                    sums[name] += weight * value_T.sum().item()
                weight_sum += weight * len(completion)
                outcome.clipped_below += int((cut_T & (ratio_T < 1)).sum())
                outcome.clipped_above += int((cut_T & (ratio_T > 1)).sum())
                edges = torch.cat((ratio_T - low, ratio_T - high))
                outcome.ratio_margin = min(outcome.ratio_margin, edges.abs().min().item())
        return {"loss": loss, **{name: value / weight_sum for name, value in sums.items()}}

    def sft_step(self, step: int, groups: list[Group]) -> Outcome:
        """Cross-entropy on the correct answers, over all their tokens including the end of turn."""
        outcome = Outcome()
        targets = [self.target(group) for group in groups]
        token_count = sum(map(len, targets))
        losses, chances = [], []
        for group, target in zip(groups, targets, strict=True):
            logp_T, _ = self.logprobs(self.policy, group, target, temperature=1.0)
            loss = -logp_T.sum() / token_count
            loss.backward()
            losses.append(loss.item())
            chances.append(math.exp(logp_T.sum().item()))
        outcome.metrics = {"loss": sum(losses), "probability": sum(chances) / len(chances)}
        outcome.metrics["tokens"] = token_count
        outcome.metrics |= self.update(step, outcome)
        return outcome

    def target(self, group: Group) -> list[int]:
        """The ids of the correct answer in the form that the config sets."""
        text = f"<answer>{group.letter}</answer>"
        if self.knobs.sft_answer == "bare":
            text = group.letter
        if self.knobs.sft_answer == "named":
            text = f"<think>The answer is {group.option}.</think>{text}"
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.end_ids[0]]

    def is_trained(self, completion: list[int]) -> bool:
        return completion[-1] in self.end_ids or not self.knobs.mask_truncated

    def logprobs(
        self, model: nn.Module, group: Group, completion: list[int], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """log pi(o_t | q, o_<t) of each token, and the entropy of pi( . | q, o_<t), both (T,)."""
        tokens = torch.tensor([[*group.prompt, *completion]])
        logits = model(
            input_ids=tokens,
            pixel_values=group.patches,
            image_grid_thw=group.grids,
            mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        ).logits[0]
        # The logits at a token predict the next one.
        logits_TV = logits[len(group.prompt) - 1 : -1] / temperature
        # The distribution is over the ids that may be sampled.
        logp_TA = logits_TV[:, self.allowed_ids].log_softmax(dim=-1)
        entropy_T = -(logp_TA.exp() * logp_TA).sum(dim=-1)
        places = torch.tensor([self.allowed_ids.index(token) for token in completion])
        return logp_TA.gather(-1, places[:, None]).squeeze(-1), entropy_T.detach()

    def logprobs_of_group(self, model: nn.Module, group: Group) -> list[Tensor]:
        """log pi of the tokens of each completion in the group."""
        temperature = self.knobs.temperature
        return [self.logprobs(model, group, o, temperature)[0] for o in group.completions]

    def update(self, step: int, outcome: Outcome) -> dict[str, float]:
        """Clip the gradient and take a step of AdamW."""
        knobs = self.knobs
        outcome.gradients.append({published(n): p.grad.clone() for n, p in self.trained.items()})
        before = {n: p.detach().clone() for n, p in self.trained.items()}
        norm = nn.utils.clip_grad_norm_(self.trained.values(), knobs.max_grad_norm)
        rate = learning_rate(step, knobs)
        for param_group in self.adamw.param_groups:
            param_group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad()
        lost = bf16_lost(before, self.trained)
        return {"grad_norm": norm.item(), "learning_rate": rate, "bf16_lost": lost}

    def weights(self) -> dict[str, Tensor]:
        """The policy's weights, by published name."""
        return {published(name): p.detach().clone() for name, p in self.policy.named_parameters()}


def load(folder: Path) -> nn.Module:
    """transformers' own model, eager attention, float32."""
    return Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def published(name: str) -> str:
    """transformers 5's parameter name -> the name in the published files."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def bf16_lost(before: dict[str, Tensor], after: dict[str, nn.Parameter]) -> float:
    """The share of the changed weights that the update would not have changed in bf16."""
    changed_count = lost_count = 0
    for name, parameter in after.items():
        change, rounded = parameter.detach() - before[name], before[name].bfloat16()
        lost = (rounded.float() + change).bfloat16() == rounded
        changed_count += int((change != 0).sum())
        lost_count += int((lost & (change != 0)).sum())
    return lost_count / changed_count


def advantages(
    rewards: list[float], all_rewards: list[list[float]], knobs: SimpleNamespace
) -> list[float]:
    """A_i = (r_i - baseline) / scale of a group; GRPO's are its mean and standard deviation."""
    if max(rewards) == min(rewards) and knobs.advantage_baseline != "none":
        return [0.0 for _ in rewards]  # nothing to learn, and no 0 / 0
    divisor = 1.0  # Dr. GRPO
    if knobs.advantage_scale == "std":
        divisor = std(rewards)
    if knobs.advantage_scale == "batch_std":
        divisor = std([reward for group in all_rewards for reward in group])
    results = []
    for i, reward in enumerate(rewards):
        compared = rewards
        if knobs.advantage_baseline == "leave_one_out":
            compared = rewards[:i] + rewards[i + 1 :]
        baseline = sum(compared) / len(compared)
        if knobs.advantage_baseline == "none":
            baseline = 0.0
        results.append((reward - baseline) / divisor)
    return results


def overlong_reward(length: int, knobs: SimpleNamespace) -> float:
    """DAPO's equation 13: 0 before the last L_cache tokens of L_max, then down to -1."""
    cache = knobs.length_penalty * knobs.max_new_tokens
    if length <= knobs.max_new_tokens - cache:
        return 0.0
    return ((knobs.max_new_tokens - cache) - length) / cache


def std(values: list[float]) -> float:
    """Standard deviation with Bessel's correction."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1))


def token_weight(length: int, lengths: list[int], knobs: SimpleNamespace) -> float:
    """The weight in the loss of each token of a completion; `lengths` are those of the step, 0 for
    completions that are not trained on.
    """
    if knobs.loss_average == "sequence":  # equation 3: 1/G sum_i 1/|o_i| sum_t
        return 1 / (len(lengths) * length)
    if knobs.loss_average == "token":  # DAPO: 1 / sum_i |o_i|
        return 1 / sum(lengths)
    return 1 / (len(lengths) * knobs.max_new_tokens)  # Dr. GRPO: the same for any lengths


def learning_rate(step: int, knobs: SimpleNamespace) -> float:
    """Linear warm-up to the peak, then linear to final_lr_ratio of it, one step after the last."""
    if step < knobs.warmup_steps:
        return knobs.learning_rate * (step + 1) / knobs.warmup_steps
    done = (step - knobs.warmup_steps) / (knobs.steps - knobs.warmup_steps)
    return knobs.learning_rate * ((1 - done) + done * knobs.final_lr_ratio)


def rollout_metrics(
    outcome: Outcome, rewards: list[list[float]], groups: list[Group], end_ids: list[int]
) -> dict[str, float]:
    """Means over completions, or over groups."""
    completions = [completion for group in groups for completion in group.completions]
    count = len(completions)
    metrics = {"reward": sum(map(sum, rewards)) / count}
    for r, name in enumerate(RULES):
        metrics[f"rewards/{name}"] = (
            sum(row[r] for group in outcome.scores for row in group) / count
        )
    metrics["reward_std"] = sum(std(group) for group in rewards) / len(groups)
    metrics["equal_groups"] = sum(max(group) == min(group) for group in rewards) / len(groups)
    metrics["tokens"] = sum(map(len, completions))
    metrics["mean_length"] = metrics["tokens"] / count
    metrics["truncated"] = sum(completion[-1] not in end_ids for completion in completions) / count
    return metrics
