"""Checkpoints with random weights and a named shape, made on the fly.

The cost of a step does not depend on the values of the weights.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model import Qwen2VL, Qwen2VLConfig, VisionConfig, read_config, save_model
from model.weights import read_companions

# Any tokenizer will do. It leaves embedding rows unused, as in the published checkpoints.
TOKENIZER = Path(__file__).resolve().parent.parent / "miniature" / "base"

# 46m is for a laptop's CPU; 2b is the shape of Qwen2-VL-2B.
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mrope_section": (2, 3, 3),
        "vision": VisionConfig(depth=2, embed_dim=64, num_heads=4),
    },
    "46m": {
        "vocab_size": 32768,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mrope_section": (8, 12, 12),
        "vision": VisionConfig(depth=4, embed_dim=256, num_heads=4),
    },
    "2b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "mrope_section": (16, 24, 24),
        "rope_theta": 1e6,
        "vision": VisionConfig(depth=32, embed_dim=1280, num_heads=16),
    },
}
SHAPES = tuple(_SHAPES)

_QUESTION = {
    "question": "What is the specific abnormality that can be seen in this slice of the brain?",
    "options": [
        "Intracranial hemorrhage",
        "Focal flair hyper intensity",
        "White matter changes",
        "Normal",
    ],
    "answer": "Normal",
    "modality": "MRI",
}


def shape(name: str) -> Qwen2VLConfig:
    """The shape called `name`, one of SHAPES, with the special tokens of our tokenizer."""
    return replace(read_config(TOKENIZER), tie_word_embeddings=True, **_SHAPES[name])


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write a checkpoint of that shape, with a tokenizer, in Hugging Face layout."""
    torch.manual_seed(0)  # the same weights for every peer and every round
    model = Qwen2VL(shape(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # norms and biases keep their default values
                parameter.normal_(0, 0.02)
    model.companions = read_companions(TOKENIZER)
    del model.companions["config.json"]  # it describes another shape
    save_model(model, folder)
    return folder


def make_questions(count: int, side: int, folder: Path) -> Path:
    """Write a question file with `count` noise images of side x side pixels. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(_QUESTION | {"image": [f"{i}.png"]})
    file = folder / "questions.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file
