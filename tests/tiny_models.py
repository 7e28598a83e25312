"""Tiny Qwen2-VL models, their checkpoints and prompts: all parts real, all weights random and none
of them trivial.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model import Qwen2VL, Qwen2VLConfig, VisionConfig

VOCABULARY = 307  # odd, so that nothing may rely on round sizes
IMAGE, VIDEO, IMAGE_START, IMAGE_END = 290, 291, 292, 293
FORBIDDEN = [IMAGE, VIDEO, IMAGE_START, IMAGE_END]
PATCH_VALUES = 3 * 2 * 14 * 14

MIXED = (
    (1, 2, (4, 4), 5, 6),
    (7, 8, 9, 10, 11, 12),
    (13, (2, 6), 14, (8, 4), (2, 2), 15, 16),
    (17, 18),
)
"""A ragged batch: one image, text, three images of different sizes, two tokens. A pair is an image
(h, w).
"""


class Batch(NamedTuple):
    """Right-padded prompts as the model takes them; `rows` are the same without padding."""

    rows: list[list[int]]
    tokens: Tensor
    lengths: Tensor
    patches: Tensor | None
    grids: Tensor | None

    @property
    def mask(self) -> Tensor:
        """bool (N, P), True on real tokens."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def row(self, n: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens (P_n,), patches and grids of one prompt alone."""
        counts = [row.count(IMAGE_START) for row in self.rows]
        first = sum(counts[:n])
        if not counts[n]:
            return self.tokens[n, : self.lengths[n]], None, None
        sizes = self.grids.prod(dim=1).tolist()
        begin, end = sum(sizes[:first]), sum(sizes[: first + counts[n]])
        return (
            self.tokens[n, : self.lengths[n]],
            self.patches[begin:end],
            self.grids[first : first + counts[n]],
        )


def make_batch(prompts: tuple[tuple[int | tuple[int, int], ...], ...], seed: int = 0) -> Batch:
    """Prompts as in MIXED -> Batch, the images' pixels random."""
    rows, grids = [], []
    for prompt in prompts:
        rows.append([])
        for part in prompt:
            if isinstance(part, int):
                rows[-1].append(part)
                continue
            rows[-1] += [IMAGE_START, *[IMAGE] * (part[0] * part[1] // 4), IMAGE_END]
            grids.append((1, *part))
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = torch.tensor(row)
    if not grids:
        return Batch(rows, tokens, lengths, None, None)
    patches = torch.randn(
        sum(h * w for _, h, w in grids), PATCH_VALUES, generator=torch.Generator().manual_seed(seed)
    )
    return Batch(rows, tokens, lengths, patches, torch.tensor(grids))


def tiny_config(
    heads: int = 4, kv_heads: int = 2, tied: bool = True, vocabulary: int = VOCABULARY
) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        vocab_size=vocabulary,
        hidden_size=heads * 16,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        mrope_section=(2, 3, 3),
        tie_word_embeddings=tied,
        vision=VisionConfig(depth=2, embed_dim=32, num_heads=2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )


def tiny_model(config: Qwen2VLConfig | None = None, seed: int = 0) -> Qwen2VL:
    torch.manual_seed(seed)  # biases keep what they are born with, and a little
    model = Qwen2VL(config or tiny_config())
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Matrices far from their small initial values; norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.copy_(0.15 * noise) if parameter.dim() > 1 else parameter.add_(0.1 * noise)


def hf_model(config: Qwen2VLConfig, seed: int = 0) -> nn.Module:
    """transformers' model of the same shape with random weights, in eval mode."""
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl import Qwen2VLConfig as HFConfig

    names = ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")
    text = {
        name: value
        for name, value in vars(config).items()
        if name in names or name.startswith("num_")
    }
    rope = {
        "rope_type": "default",
        "mrope_section": list(config.mrope_section),
        "rope_theta": config.rope_theta,
    }
    model = Qwen2VLForConditionalGeneration(
        HFConfig(
            text_config={
                **text,
                "rope_parameters": rope,
                "bos_token_id": None,
                "eos_token_id": None,
            },
            vision_config={**vars(config.vision), "hidden_size": config.hidden_size},
            **{name: value for name, value in vars(config).items() if name.endswith("_token_id")},
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    randomise(model, seed)
    return model


def flat_config(config: Qwen2VLConfig) -> dict[str, Any]:
    """config.json in the layout of the published checkpoints, with the fields that they have beside
    those we need.
    """
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_token_id": 294,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2_vl",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": config.vision.depth,
            "embed_dim": config.vision.embed_dim,
            "mlp_ratio": config.vision.mlp_ratio,
            "num_heads": config.vision.num_heads,
            "in_chans": 3,
            "hidden_size": config.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "vocab_size": config.vocab_size,
    }


def write_weights(tensors: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """model.safetensors, or several files dealt in turn with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
