"""One question, followed through a step of training: each function, and what comes out of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import Config, load_config
from data import PromptEncoder, Vocabulary, load_vocabulary, read_questions
from data.choice import prompt_encoder
from data.images import preprocess
from evaluation.report.markdown import markdown_table, write_between_markers
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss, token_weights
from grpo.optimizer import MasterAdamW
from grpo.rollout import Rollout, completion_logprobs
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL, load_model
from model.vision import VisionTower
from rewards import score
from training.scoring import weighted_sum

GROUP = 4

Stop = tuple[str, str, str]
"""A link to the file of a function, the function, and what comes out of it."""


def stop(function: Callable[..., Any], result: str = "", **tensors: Tensor) -> Stop:
    file = function.__module__.replace(".", "/") + ".py"
    shapes = ", ".join(f"`{name}` {tuple(x.shape)}" for name, x in tensors.items())
    return f"[{file}](../{file})", f"`{function.__qualname__}`", result or shapes


def write_tour(folder: Path) -> None:
    """Fill the markers of `folder`/tour.md, and that of the group in `folder`/grpo.md."""
    config = load_config("configs/miniature.toml", {"group_size": GROUP})
    policy = load_model(config.model, "cpu", config.dtype)
    vocabulary = load_vocabulary(config.model, policy.config)
    rollout, rewards_NG, stops = sample(policy, vocabulary, config)
    advantages_NG = group_advantages(rewards_NG)
    stops.append(stop(group_advantages, advantages_NG=advantages_NG))
    stops += update(policy, vocabulary, config, rollout, advantages_NG)
    table = markdown_table(("file", "function", "what comes out"), stops)
    group = group_text(rollout, rewards_NG, advantages_NG)
    print(f"{table}\n{group}")
    write_between_markers(folder / "tour.md", "stops", table)
    write_between_markers(folder / "grpo.md", "group", group)


def sample(
    policy: Qwen2VL, vocabulary: Vocabulary, config: Config
) -> tuple[Rollout, Tensor, list[Stop]]:
    """The rollout and the rewards of the first question whose completions have three of them."""
    encoder = prompt_encoder(vocabulary, policy.config, config)
    noise_NGT = sampling_noise(config.seed, 0, range(1), GROUP, config.max_new_tokens)
    for question in read_questions(config.train_questions):
        prompt = encoder.encode(question)
        rollout = sample_groups(policy, vocabulary, [prompt], noise_NGT)
        verdicts_G = [score(text, question.answer) for text in rollout.texts[0]]
        rewards_NG = weighted_sum([verdicts_G], config)
        if rewards_NG.unique().numel() > 2:
            break
    features_ID = policy.encode_images(prompt.patches_SC, prompt.grids_I3)
    tokens_P, positions_3P = prompt.tokens_P, prompt.positions_3P
    stops = [
        stop(read_questions, f"a `Question`: {question.question!r}"),
        stop(preprocess, patches_SC=prompt.patches_SC),
        stop(PromptEncoder.encode, tokens_P=tokens_P, positions_3P=positions_3P),
        stop(VisionTower, features_ID=features_ID),
        stop(sampling_noise, noise_NGT=noise_NGT),
        stop(sample_groups, tokens_NGT=rollout.tokens_NGT, mask_NGT=rollout.mask_NGT),
        stop(score, f"{GROUP} x {len(verdicts_G[0])} verdicts"),
        stop(weighted_sum, rewards_NG=rewards_NG),
    ]
    return rollout, rewards_NG, stops


def update(
    policy: Qwen2VL, vocabulary: Vocabulary, config: Config, rollout: Rollout, advantages_NG: Tensor
) -> list[Stop]:
    """The second half of the step, from the reference to the new weights."""
    reference = load_model(config.model, "cpu", config.dtype)
    (batch,) = rollout.micro_batches(config.micro_batch_tokens)
    mask_NGT, allowed_V = batch.mask_NGT, vocabulary.allowed_V
    ref_NGT = completion_logprobs(reference, batch, allowed_V, 1.0)[0].detach()
    weights_NGT = token_weights(rollout.mask_NGT)
    logp_NGT, _ = completion_logprobs(policy, batch, allowed_V, 1.0)
    old_NGT = logp_NGT.detach()
    loss, _ = grpo_loss(logp_NGT, old_NGT, ref_NGT, advantages_NG, mask_NGT, weights=weights_NGT)
    loss.backward()
    optimizer = MasterAdamW(policy, config)
    optimizer.accumulate()
    norm = optimizer.step(config.learning_rate)["grad_norm"]
    return [
        stop(completion_logprobs, ref_NGT=ref_NGT),
        stop(token_weights, weights_NGT=weights_NGT),
        stop(completion_logprobs, logp_NGT=logp_NGT),
        stop(grpo_loss, f"the loss, {loss:.4f}"),
        stop(MasterAdamW.step, f"new weights; gradient norm {norm:.3f}"),
    ]


def group_text(rollout: Rollout, rewards_NG: Tensor, advantages_NG: Tensor) -> str:
    """The question, and the group as a table: completions, rewards and advantages."""
    mean, std = rewards_NG.mean(), rewards_NG.std()
    rows = []
    for text, reward, advantage in zip(
        rollout.texts[0], rewards_NG[0], advantages_NG[0], strict=True
    ):
        rows.append((f"`{text}`", f"{reward:g}", f"{reward - mean:+.2f}", f"{advantage:+.2f}"))
    table = markdown_table(("completion", "reward", "less the mean", "advantage"), rows)
    question = rollout.prompts[0].question
    options = f"({', '.join(question.options)}; right is {question.answer})"
    end = f"Mean {mean:.2f}, standard deviation {std:.2f}."
    return f"{question.question} {options}\n\n{table}\n{end}\n"
