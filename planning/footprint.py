"""Estimates the memory and time of a run, phase by phase.

The sizes of weights and optimiser state are computed. Activations are measured, by running the
model's own code on meta tensors (shapes without values). Every completion is assumed to reach the
length limit. Small contributions are ignored: the optimiser step (AdamW is fused and works in
place), gradient clipping, rewards and loss.
"""

from collections import Counter

import torch
from torch import Tensor

from common.config import Config
from data import PromptEncoder, Question
from grpo.rollout import MicroBatch, PromptBatch, collate, completion_logprobs
from model import Qwen2VL, Qwen2VLConfig
from model.cache import GroupCache
from model.linear import linear

from .meter import MEASURED, Meter, Phase, fused_attention
from .speed import Speed
from .workload import Workload

FP32_GRADIENTS = "fp32 gradients"
CACHE, SAVED = "keys and values", "copy to save"


class Rehearsal:
    """A run of `config` on meta tensors.

    Attributes:
        weights, saved: size of the policy's weights and of a checkpoint, in bytes.
        device, host: bytes, by purpose, that are held throughout the run in device memory, and in
            host memory if the device is a GPU.
    """

    def __init__(
        self, config: Config, shape: Qwen2VLConfig, encoder: PromptEncoder, load: Workload
    ) -> None:
        self.config, self.encoder, self.load = config, encoder, load
        with torch.device("meta"):
            self.policy = Qwen2VL(shape).to(getattr(torch, config.dtype))
        self.policy.recompute = config.activation_checkpointing
        self.policy.visual.requires_grad_(not config.freeze_vision)
        trained = [param for param in self.policy.parameters() if param.requires_grad]
        numbers = sum(param.numel() for param in trained)
        self.weights = sum(param.nbytes for param in self.policy.parameters())
        self.gpu = config.device.startswith("cuda")
        self.offload = self.gpu and config.offload_optimizer
        # The optimiser uses an fp32 model's own weights and gradients, unless it is offloaded.
        self.fp32_copy = 4 * numbers if self.offload or config.dtype != "float32" else 0
        optimizer = Counter({"fp32 masters": self.fp32_copy, "AdamW's moments": 8 * numbers})
        self.saved = self.weights + optimizer.total()
        self.device, self.host = Counter(policy=self.weights), Counter[str]()
        if config.method == "grpo" and config.beta:
            # The two models share a frozen vision tower.
            self.device["reference"] = sum(param.nbytes for param in trained)
        (self.host if self.offload else self.device).update(optimizer)

    def run(self, speed: Speed) -> dict[str, Phase]:
        """Rehearse one step. Returns its phases by name, each with its device memory at the peak.

        Further entries: "test", a batch of questions when accuracy is measured; and "saving" (a
        checkpoint) on a CPU, or "host" (the peak of host memory) for a GPU.
        """
        self.meter = Meter(speed, outside=self.policy.parameters())
        config, load, phases = self.config, self.load, {}
        passes = config.prompts_per_step / load.micro_batch
        library = fused_attention()
        if load.tested:
            phases["test"] = self._sample(load.tested, load.test_batch, 1)
        if config.method == "grpo":
            size = config.questions_per_step, config.group_size
            phases["rollout"] = self._sample(load.trained, *size)
        for name in self._passes_without_gradient():
            with self.meter.phase() as phases[name], torch.no_grad():
                self._log_probabilities()
            phases[name].seconds *= passes
        phases["update"] = self._update()
        phases["update"].seconds *= passes * config.inner_updates
        del library
        for phase in phases.values():
            phase.memory = self.device + phase.memory
        # A checkpoint is copied first, and written while the run continues.
        where = self.host if self.gpu else self.device
        phases["host" if self.gpu else "saving"] = Phase(where + Counter({SAVED: self.saved}))
        return phases

    def _passes_without_gradient(self) -> list[str]:
        names = []
        if self.device["reference"]:  # it has the policy's shape
            names.append("reference")
        if self.config.method == "grpo" and self.config.inner_updates > 1:
            names.append("old policy")
        return names

    def _prompts(self, question: Question, count: int) -> PromptBatch:
        """A batch of identical prompts, with images of the right size but without pixels."""
        values = self.policy.config.vision.patch_values
        grids = self.encoder.grids(question)
        images = [(torch.empty(t * h * w, values), (t, h, w)) for t, h, w in grids]
        return collate([self.encoder.assemble(question, images) for _ in range(count)])

    @torch.no_grad()
    def _sample(self, question: Question, count: int, group_size: int) -> Phase:
        """Measure the prefill, and the last decoding step: it attends to the most tokens."""
        policy, length = self.policy, self.config.max_new_tokens
        with self.meter.phase() as phase:
            prompts = self._prompts(question, count)
            size, dtype = prompts.tokens_NP.shape[1], policy.embed.weight.dtype
            cache = GroupCache(count, size, group_size, length, dtype, torch.device("cpu"))
            policy.prefill(*prompts.parts(), cache)
            prefill = phase.seconds
            zeros_R = torch.zeros(count * group_size, dtype=torch.int64)
            hidden_RD = policy.decode(zeros_R, zeros_R, cache, length, padded=self.gpu)
            linear(hidden_RD, policy.head_weight).float().log_softmax(dim=-1)
        phase.seconds += (length - 1) * (phase.seconds - prefill)
        for buffer in cache.prompt + cache.own:
            phase.memory[CACHE] += buffer.nbytes
        phase.memory[MEASURED] -= phase.memory[CACHE]
        return phase

    def _log_probabilities(self) -> Tensor:
        policy, load = self.policy, self.load
        prompts = self._prompts(load.trained, load.micro_batch)
        allowed_V = torch.ones(policy.config.vocab_size, dtype=torch.bool)
        mask_NGT = allowed_V[0].expand(load.micro_batch, load.group_size, load.completion)
        batch = MicroBatch(slice(None), prompts, mask_NGT.long(), mask_NGT)
        return completion_logprobs(policy, batch, allowed_V, temperature=1.0)[0]

    def _update(self) -> Phase:
        accumulates = self.load.micro_batch < self.config.prompts_per_step
        for _ in range(1 + accumulates):  # the second pass adds to the gradients of the first
            with self.meter.phase() as phase:
                torch.autograd.backward(self._log_probabilities().sum())
            if self.fp32_copy:  # they are added to the fp32 gradients, then freed
                self.policy.zero_grad()
        if self.offload:
            self.host[FP32_GRADIENTS] = self.fp32_copy
        elif accumulates:
            phase.memory[FP32_GRADIENTS] = self.fp32_copy
        elif phase.memory[MEASURED] < self.fp32_copy:  # allocated after the activations are freed
            phase.memory = Counter({FP32_GRADIENTS: self.fp32_copy})
        return phase
