"""What a run holds in memory and computes, phase by phase: its own code, rehearsed on tensors
without values.

Left out is what is small: the optimiser's step (AdamW is fused and works in place), the clipping of
gradients, rewards and loss. All completions are taken to be as long as they may be.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.config import Config
from data import Prompt, PromptEncoder, Question, Vocabulary
from grpo.optimizer import MasterAdamW
from grpo.rollout import MicroBatch, PromptBatch, collate, completion_logprobs, with_image_features
from grpo.sampler import RolloutKind, growing_rows
from model import Qwen2VL, Qwen2VLConfig

from .meter import Meter, fused_kernels
from .workload import Load

POLICY, REFERENCE, MASTERS, MOMENTS = "policy", "reference", "fp32 masters", "AdamW's moments"
GRADIENTS, FP32_GRADIENTS, ARRANGED = "gradients", "fp32 gradients", "arranged weights"
CACHE, IMAGES, SAVED = "keys and values", "images", "copy to save"


class Rehearsal:
    """A run of `config` without values. What each of its phases holds and does is in
    `meter.phases`.

    On a GPU, what lies in the host's memory is what the meter calls elsewhere.
    """

    def __init__(
        self, config: Config, shape: Qwen2VLConfig, encoder: PromptEncoder, vocabulary: Vocabulary
    ) -> None:
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.gpu = config.device.startswith("cuda")
        offload = self.gpu and config.offload_optimizer
        hosted = (IMAGES, SAVED, *((MASTERS, MOMENTS, FP32_GRADIENTS) if offload else ()))
        self.meter = Meter(elsewhere=hosted if self.gpu else ())
        with torch.device("meta"):
            self.policy, base = (Qwen2VL(shape).to(getattr(torch, config.dtype)) for _ in range(2))
        self.policy.recompute = config.activation_checkpointing
        self.reference = (
            base.requires_grad_(False) if config.beta and config.method == "grpo" else None
        )
        if config.freeze_vision:
            self.policy.visual.requires_grad_(False)
            if self.reference is not None:
                self.reference.visual = self.policy.visual
        with self.meter.making(MASTERS), self.meter:
            self.optimizer = MasterAdamW(self.policy, replace(config, offload_optimizer=offload))
        if self.reference is not None:
            self.meter.assign(REFERENCE, self.reference.parameters())
        self.meter.assign(POLICY, self.policy.parameters())

    def run(self, load: Load) -> Meter:
        """Go once through all that a run does with memory."""
        with fused_kernels(self.gpu), self.meter:
            if load.tested:
                self._sample("test", self._prompts(load.tested), 1, self.config.max_new_tokens)
            self._make_moments()
            self._step(load)
            self._save()
        return self.meter

    def _step(self, load: Load) -> None:
        step, micro_batch = self._prompts(load.step), self._prompts(load.micro_batch)
        coming = self._prompts(load.step)  # read while this step is worked on
        if self.config.freeze_vision:
            step, micro_batch = (
                with_image_features(self.policy, prompts) for prompts in (step, micro_batch)
            )
        if self.config.method == "grpo":
            self._sample("rollout", step, load.group_size, load.completion)
        batch = collate(micro_batch)
        del micro_batch  # they are some of the step's
        shape = len(load.micro_batch), load.group_size, load.completion
        if self.reference is not None:
            with self.meter.phase("reference"), torch.no_grad():
                self._log_probabilities(self.reference, batch, shape)
        for name in ("update", "further update")[: 1 + load.accumulates]:
            self._update(name, batch, shape)
        self.optimizer.forget_gradients()
        del step, coming

    def _prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        with self.meter.making(IMAGES):
            values = self.policy.config.vision.patch_values
            grids = [self.encoder.grids(question) for question in questions]
            seen = [
                [(torch.empty(t * h * w, values), (t, h, w)) for t, h, w in images]
                for images in grids
            ]
            return [self.encoder.assemble(*pair) for pair in zip(questions, seen)]

    def _make_moments(self) -> None:
        """As they are from the second step on."""
        with self.meter.making(MOMENTS):
            for master in self.optimizer.masters:
                self.optimizer.adamw.state[master] = {
                    name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")
                }

    @torch.no_grad()
    def _sample(self, name: str, prompts: list[Prompt], group_size: int, length: int) -> None:
        """The prompts, and one token of all that follow: the last, which sees the most."""
        self.policy.rollout_state = None
        size = len(prompts), group_size, length
        with self.meter.phase(name):
            batch = collate(prompts)
            kind = RolloutKind(size, self.config.temperature, greedy=name == "test")
            growing = growing_rows(self.policy, self.vocabulary, kind, batch.tokens_NP.shape[1])
            growing.begin(self.policy, batch, None if kind.greedy else torch.zeros(size))
            self.meter.assign(CACHE, growing.cache.prompt + growing.cache.own)
        with self.meter.phase(f"{name}, a token"):
            arranged = self._arranged()
            growing.decode_and_choose(self.policy, span=length, padded=self.gpu)
        del arranged
        if self.gpu:  # there the state of a rollout stays until the next
            self.policy.rollout_state = growing

    def _arranged(self) -> list[Tensor]:
        """What `model.linear.arranged` makes, on a processor in fp32."""
        if self.gpu or self.config.dtype != "float32":
            return []
        with self.meter.making(ARRANGED):
            return [torch.empty_like(weight) for weight in self.policy.decoding_weights()]

    def _log_probabilities(
        self, model: Qwen2VL, batch: PromptBatch, shape: tuple[int, int, int]
    ) -> Tensor:
        tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        micro_batch = MicroBatch(slice(None), batch, tokens, mask)
        allowed_V = self.vocabulary.allowed_V
        return completion_logprobs(model, micro_batch, allowed_V, self.config.temperature)[0]

    def _update(self, name: str, batch: PromptBatch, shape: tuple[int, int, int]) -> None:
        with self.meter.phase(name):
            self._log_probabilities(self.policy, batch, shape).sum().backward()
            self.meter.assign(GRADIENTS, (param.grad for param in self.optimizer.params))
            with self.meter.making(FP32_GRADIENTS):
                self.optimizer.accumulate()

    def _save(self) -> None:
        """What is saved is copied in the host's memory first, and written from there while the run
        goes on.
        """
        with self.meter.phase("checkpoint"), self.meter.making(SAVED):
            copies = [torch.empty_like(tensor) for tensor in self.saved()]
        del copies

    def saved(self) -> list[Tensor]:
        """What a checkpoint holds."""
        return [*self.policy.parameters(), *self.optimizer.state().values()]
