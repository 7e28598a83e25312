"""A whole run in miniature: random base of a few thousand weights, tokenizer, images and questions
on disk.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import SPECIAL_TOKENS, tiny_tokenizer

from model import Qwen2VL, Qwen2VLConfig, VisionConfig, save_model

VISION_TOKENS = dict(
    zip(
        ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
        SPECIAL_TOKENS[3:],
        strict=True,
    )
)


def tiny_model(seed: int = 0, **shape: object) -> Qwen2VL:
    """Random Qwen2-VL that fits `tiny_tokenizer`, with 13 embedding rows that no token uses."""
    ids = {
        field: tiny_tokenizer().convert_tokens_to_ids(token)
        for field, token in VISION_TOKENS.items()
    }
    fields = dict(
        vocab_size=340,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(2, 3, 3),
        rope_theta=1e4,
        tie_word_embeddings=True,
        vision=VisionConfig(depth=1, embed_dim=16, num_heads=2),
        **ids,
    )
    torch.manual_seed(seed)
    model = Qwen2VL(Qwen2VLConfig(**{**fields, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    return model


def write_run(folder: Path, **fields: object) -> Path:
    """Base, 8 MRI questions to train on, 8 MRI and 4 X-ray ones to test on, and a config; returns
    the config's path.
    """
    save_model(tiny_model(), folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "questions").mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)).save(
            folder / "questions" / f"{i}.png"
        )
        rows.append(
            {
                "image": [f"{i}.png"],
                "question": "What is seen?",
                "options": ["Mass", "Normal", "Fracture"][: 2 + i % 2],
                "answer": "Normal",
                "subset": "MR (Mag-netic Resonance Imaging)" if i < 16 else "X-Ray",
            }
        )
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (folder / "questions" / f"{name}.json").write_text(json.dumps(part))
    config = {
        "model": str(folder / "base"),
        "train_questions": str(folder / "questions" / "train.json"),
        "test_questions": [str(folder / "questions" / "test.json")],
        "run_dir": str(folder / "run"),
        "train_modality": "MRI",
        "steps": 4,
        "prompts_per_step": 3,
        "group_size": 4,
        "max_new_tokens": 10,
        "micro_batch_tokens": 250,
        "save_every": 2,
        "learning_rate": 1e-3,
        **fields,
    }
    (folder / "config.toml").write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    )
    return folder / "config.toml"
