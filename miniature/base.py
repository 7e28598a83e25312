"""Make the base of the miniature from nothing but this code and a seed (about half an hour on 2
cores).

    python -m miniature.base --out miniature/base

A Qwen2-VL of 1.5 million parameters in Hugging Face layout, that *can* name what a phantom shows
and *can* find the letter of what it has named, but seldom does both unless it happens to think on
topic. See stages.py for how, and the README.md that this writes for what it reaches.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from data.vocabulary import load_vocabulary
from model import Qwen2VL, load_model, save_model
from model.config import Qwen2VLConfig, VisionConfig

from .card import write_card
from .lessons import Teacher
from .measure import SAMPLES, measure
from .pool import Pool, draw_pool
from .stages import learn_describing, learn_habits, learn_matching, learn_seeing
from .tokenizer import build_tokenizer, save_tokenizer
from .training import initialise

SEED = 7
POOL_IMAGES = 40_000
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 401408,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def base_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Small, and rotary positions with a short period: prompts have about 130 tokens, not
    32,000.
    """
    ids = tokenizer.get_vocab()
    return Qwen2VLConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, rope_theta=1e4, mrope_section=(4, 6, 6), tie_word_embeddings=True,
        vision=VisionConfig(depth=3, embed_dim=96, num_heads=3), image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def make_base(folder: Path, seed: int = SEED) -> None:
    """All stages, then the folder, then the measurements of what was written."""
    started = time.time()
    tokenizer = build_tokenizer()
    model = Qwen2VL(base_config(tokenizer))
    initialise(model, seed)
    teacher, pool = Teacher(tokenizer, seed), draw_pool(seed, "base", POOL_IMAGES)
    # The first two stages share no weight: one core each, which beats two cores in turn.
    torch.set_num_threads(1)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        tower = executor.submit(_train_tower, model.config, pool, seed)
        learn_matching(model, teacher)
        model.visual.load_state_dict(
            {name: torch.from_numpy(value) for name, value in tower.result().items()}
        )
    torch.set_num_threads(2)
    learn_describing(model, teacher, pool)
    learn_habits(model, teacher, pool)
    minutes = (time.time() - started) / 60

    write_folder(model, tokenizer, folder)
    shipped = load_model(folder, device="cpu", dtype=torch.float32)
    results = measure(shipped, load_vocabulary(folder, shipped.config), seed)
    write_card(folder / "README.md", results, minutes, SAMPLES)


def write_folder(model: Qwen2VL, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in bf16, config, tokenizer, and the two small files that other programs look for."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    save_model(model.to(torch.bfloat16), folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def _train_tower(config: Qwen2VLConfig, pool: Pool, seed: int) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    model = Qwen2VL(config)
    initialise(model, seed)
    learn_seeing(model, pool, seed)
    return {name: value.numpy() for name, value in model.visual.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base model of the miniature.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write to, for instance miniature/base"
    )
    make_base(parser.parse_args().out)


if __name__ == "__main__":
    main()
