"""One question, followed through a step of training: each function, and what comes out of it."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.config import Config, load_config
from data import Prompt, PromptEncoder, Vocabulary, load_vocabulary, read_questions
from data.choice import prompt_encoder
from evaluation.report.markdown import markdown_table, write_between_markers
from grpo.advantages import group_advantages
from grpo.loss import grpo_loss, token_weights
from grpo.optimizer import MasterAdamW
from grpo.rollout import Rollout, completion_logprobs
from grpo.sampler import sample_groups, sampling_noise
from model import Qwen2VL, load_model
from rewards import score
from training.scoring import weighted_sum

GROUP = 4


class Stop(NamedTuple):
    """A function on the way, and what comes out of it."""

    file: str
    function: str
    result: str


class Tour:
    """A step of one question: the first whose completions do not all have the same reward."""

    def __init__(self) -> None:
        self.config: Config = load_config("configs/miniature.toml", {"group_size": GROUP})
        self.policy: Qwen2VL = load_model(self.config.model, "cpu", self.config.dtype)
        self.reference = load_model(self.config.model, "cpu", self.config.dtype)
        self.vocabulary: Vocabulary = load_vocabulary(self.config.model, self.policy.config)
        self.encoder: PromptEncoder = prompt_encoder(
            self.vocabulary, self.policy.config, self.config
        )
        self.noise_NGT = sampling_noise(
            self.config.seed, 0, range(1), GROUP, self.config.max_new_tokens
        )
        for question in read_questions(self.config.train_questions):
            self.prompt: Prompt = self.encoder.encode(question)
            self.rollout: Rollout = sample_groups(
                self.policy, self.vocabulary, [self.prompt], self.noise_NGT
            )
            texts = self.rollout.texts[0]
            self.verdicts_NG = [[score(text, question.answer) for text in texts]]
            self.rewards_NG = weighted_sum(self.verdicts_NG, self.config)
            if self.rewards_NG.unique().numel() > 2:
                break
        self.advantages_NG = group_advantages(self.rewards_NG)

    def group(self) -> str:
        """The group as a table: completions, rewards and advantages."""
        rows = []
        mean, std = self.rewards_NG.mean(), self.rewards_NG.std()
        numbers = zip(self.rewards_NG[0].tolist(), self.advantages_NG[0].tolist(), strict=True)
        for text, (reward, advantage) in zip(self.rollout.texts[0], numbers, strict=True):
            rows.append((f"`{text}`", f"{reward:g}", f"{reward - mean:+.2f}", f"{advantage:+.2f}"))
        question = self.prompt.question
        asked = f"{question.question} ({', '.join(question.options)}; right is {question.answer})"
        head = ("completion", "reward", "less the mean", "advantage")
        table = markdown_table(head, rows)
        return f"{asked}\n\n{table}\nMean {mean:.2f}, standard deviation {std:.2f}.\n"

    def stops(self) -> list[Stop]:
        """All functions in the order of a step."""
        prompt, rollout, question = self.prompt, self.rollout, self.prompt.question
        features_ID = self.policy.encode_images(prompt.patches_SC, prompt.grids_I3)
        stops = [
            Stop("data/readers.py", "read_questions", f"a `Question`: {question.question!r}"),
            Stop("data/images.py", "preprocess", shapes(patches_SC=prompt.patches_SC)),
            Stop(
                "data/encode.py",
                "PromptEncoder.encode",
                shapes(tokens_P=prompt.tokens_P, positions_3P=prompt.positions_3P),
            ),
            Stop("model/vision.py", "VisionTower", shapes(features_ID=features_ID)),
            Stop("grpo/sampler.py", "sampling_noise", shapes(noise_NGT=self.noise_NGT)),
            Stop(
                "grpo/sampler.py",
                "sample_groups",
                shapes(tokens_NGT=rollout.tokens_NGT, mask_NGT=rollout.mask_NGT),
            ),
            Stop("rewards/rules.py", "score", f"{GROUP} x {len(self.verdicts_NG[0][0])} verdicts"),
            Stop("training/scoring.py", "weighted_sum", shapes(rewards_NG=self.rewards_NG)),
            Stop(
                "grpo/advantages.py", "group_advantages", shapes(advantages_NG=self.advantages_NG)
            ),
        ]
        return stops + self._update()

    def _update(self) -> list[Stop]:
        """The second half of the step, from the reference to the new weights."""
        (batch,) = self.rollout.micro_batches(self.config.micro_batch_tokens)
        allowed_V = self.vocabulary.allowed_V
        weights_NGT = token_weights(self.rollout.mask_NGT)
        ref_NGT = completion_logprobs(self.reference, batch, allowed_V, 1.0)[0].detach()
        logp_NGT, _ = completion_logprobs(self.policy, batch, allowed_V, 1.0)
        loss, _ = grpo_loss(
            logp_NGT,
            logp_NGT.detach(),
            ref_NGT,
            self.advantages_NG,
            batch.mask_NGT,
            weights=weights_NGT,
        )
        loss.backward()
        optimizer = MasterAdamW(self.policy, self.config)
        optimizer.accumulate()
        norm = optimizer.step(self.config.learning_rate)["grad_norm"]
        return [
            Stop("grpo/rollout.py", "completion_logprobs", shapes(ref_NGT=ref_NGT)),
            Stop("grpo/loss.py", "token_weights", shapes(weights_NGT=weights_NGT)),
            Stop("grpo/rollout.py", "completion_logprobs", shapes(logp_NGT=logp_NGT)),
            Stop("grpo/loss.py", "grpo_loss", f"the loss, {loss:.4f}"),
            Stop("grpo/optimizer.py", "MasterAdamW.step", f"new weights; gradient norm {norm:.3f}"),
        ]


def shapes(**tensors: Tensor) -> str:
    return ", ".join(f"`{name}` {tuple(x.shape)}" for name, x in tensors.items())


def write_tour(folder: Path) -> None:
    tour = Tour()
    rows = []
    for stop in tour.stops():
        rows.append((f"[{stop.file}](../{stop.file})", f"`{stop.function}`", stop.result))
    table = markdown_table(("file", "function", "what comes out"), rows)
    group = tour.group()
    print(f"{table}\n{group}")
    write_between_markers(folder / "tour.md", "stops", table)
    write_between_markers(folder / "grpo.md", "group", group)
