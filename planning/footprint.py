"""What a run holds in memory and how long it takes, phase by phase.

Weights and the optimiser's state are arithmetic. Activations are measured: the model's own code
runs on tensors without values. All completions are taken to be as long as they may be. Left out is
what is small: the optimiser's step (AdamW is fused and works in place), clipping, rewards and loss.
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
    """A run of `config` without values.

    Attributes:
        weights, saved: bytes of the policy's weights, and of a checkpoint.
        device, host: bytes by purpose that are held from beginning to end in the memory of the
            device, and of its host if the device is a GPU.
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
        # An fp32 model's own weights and gradients serve the optimiser, if they lie where it does.
        self.fp32_copy = 4 * numbers if self.offload or config.dtype != "float32" else 0
        optimizer = Counter({"fp32 masters": self.fp32_copy, "AdamW's moments": 8 * numbers})
        self.saved = self.weights + optimizer.total()
        self.device, self.host = Counter(policy=self.weights), Counter[str]()
        if config.method == "grpo" and config.beta:
            # A vision tower that is not trained serves both models.
            self.device["reference"] = sum(param.nbytes for param in trained)
        (self.host if self.offload else self.device).update(optimizer)

    def run(self, speed: Speed) -> dict[str, Phase]:
        """Go once through all that a step does with memory. Returns by name the phases of a step,
        each with what it holds in the device's memory; "test", a batch of the questions that
        measure accuracy; and "saving" a checkpoint, or "host", a GPU's host at its fullest.
        """
        self.meter = Meter(speed, outside=self.policy.parameters())
        config, load, phases = self.config, self.load, {}
        passes = config.prompts_per_step / load.micro_batch
        library = fused_attention()
        if load.tested:
            phases["test"] = self._sample(load.tested, load.test_batch, 1)
        if config.method == "grpo":
            size = config.prompts_per_step, config.group_size
            phases["rollout"] = self._sample(load.trained, *size)
        if self.device["reference"]:  # another model, but of the policy's shape
            with self.meter.phase() as phases["reference"], torch.no_grad():
                self._log_probabilities()
            phases["reference"].seconds *= passes
        phases["update"] = self._update()
        phases["update"].seconds *= passes * config.inner_updates
        del library
        for phase in phases.values():
            phase.memory = self.device + phase.memory
        # What is saved is copied first, and written while the run goes on.
        where = self.host if self.gpu else self.device
        phases["host" if self.gpu else "saving"] = Phase(where + Counter({SAVED: self.saved}))
        return phases

    def _prompts(self, question: Question, count: int) -> PromptBatch:
        """A batch of equal prompts whose images have no pixels."""
        values = self.policy.config.vision.patch_values
        grids = self.encoder.grids(question)
        images = [(torch.empty(t * h * w, values), (t, h, w)) for t, h, w in grids]
        return collate([self.encoder.assemble(question, images) for _ in range(count)])

    @torch.no_grad()
    def _sample(self, question: Question, count: int, group_size: int) -> Phase:
        """The prompts, and of the tokens that follow the last, which attends to the most."""
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
        for _ in range(1 + accumulates):  # the second adds to the gradients of the first
            with self.meter.phase() as phase:
                torch.autograd.backward(self._log_probabilities().sum())
            if self.fp32_copy:  # they are added to the fp32 ones, and go
                self.policy.zero_grad()
        if self.offload:
            self.host[FP32_GRADIENTS] = self.fp32_copy
        elif accumulates:
            phase.memory[FP32_GRADIENTS] = self.fp32_copy
        elif phase.memory[MEASURED] < self.fp32_copy:  # made when the activations are gone
            phase.memory = Counter({FP32_GRADIENTS: self.fp32_copy})
        return phase
