"""Make the base of the miniature from nothing but this code and a seed (about half an hour on 2
cores).

    python -m miniature.base --out miniature/base

A Qwen2-VL of 1.5 million parameters in Hugging Face layout. It *can* answer questions about
phantoms in both ways, by a letter at once and by a thought on topic, and mostly does neither: for
three of four phrasings its habits hide what it can do. stages.py says how it is made; the
README.md that this writes says what it reaches.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from common.program import run_program
from data.images import MEAN, STD
from data.vocabulary import load_vocabulary
from model import Qwen2VL, keep_freed_memory, load_model, save_model
from model.config import Qwen2VLConfig, VisionConfig

from .card import write_card
from .lessons import Teacher
from .measure import Rates, measure
from .pool import Pool, draw_pool
from .stages import answering, describing, habits, matching, matching_in_chat, seeing
from .tokenizer import build_tokenizer
from .training import fit, initialise
from .words import VALUES

SEED = 7
POOL_IMAGES = 40_000  # so many that the tower meets a phantom three times, and learns none by heart
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "min_pixels": 3136,  # 4 image tokens; a phantom has 9, so that none is resized
    "max_pixels": 401408,  # 512 image tokens
    "patch_size": VisionConfig.patch_size,
    "temporal_patch_size": VisionConfig.temporal_patch_size,
    "merge_size": VisionConfig.spatial_merge_size,
    "image_mean": MEAN,
    "image_std": STD,
}


def base_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """As small as still learns to see, to name and to match within minutes."""
    ids = tokenizer.get_vocab()
    return Qwen2VLConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_theta=1e4,  # prompts have about 130 tokens; 1e6 is for 32,000
        mrope_section=(4, 6, 6),  # as 16, 24, 24 share a head of 128
        tie_word_embeddings=True,
        vision=VisionConfig(depth=3, embed_dim=96, num_heads=3),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def make_base(folder: Path, seed: int = SEED) -> None:
    """All stages, then the folder, then the measurements of what was written."""
    started = time.time()
    keep_freed_memory()
    threads = min(2, torch.get_num_threads())  # more would wait for each other on so small a model
    tokenizer = build_tokenizer()
    model = Qwen2VL(base_config(tokenizer))
    initialise(model, seed)
    teacher = Teacher(tokenizer, seed)
    pool = draw_pool(seed, "base", POOL_IMAGES)
    model.visual.requires_grad_(False)  # from here to the end: it is trained beside, and then kept
    # The first two stages share no weight, so each has a core of its own: faster than one after the
    # other on two.
    torch.set_num_threads(1)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        tower = executor.submit(_train_tower, model.config, pool, seed)
        # At twice this rate the circuit from word to letter does not form.
        fit("matching", model, matching(model, teacher), steps=900, rate=1e-3)
        fit("in chat", model, matching_in_chat(model, teacher), steps=500, rate=1e-3)
        for name, parameter in model.visual.named_parameters():
            parameter.copy_(torch.from_numpy(tower.result()[name]))
    torch.set_num_threads(threads)
    fit("describing", model, describing(model, teacher, pool), steps=700, rate=1e-3)
    fit("answering", model, answering(model, teacher, pool), steps=1500, rate=1e-3)
    taught = write_and_measure(model, tokenizer, folder, seed)
    fit("habits", model, habits(model, teacher, pool), steps=700, rate=7e-4)
    minutes = (time.time() - started) / 60

    results = write_and_measure(model, tokenizer, folder, seed)
    for modality, rates in taught.items():
        results[f"{modality}, before habits"] = rates
    write_card(folder / "README.md", results, minutes)


def write_and_measure(
    model: Qwen2VL, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int
) -> dict[str, Rates]:
    """Write the folder, and measure what it holds: the weights as rounded to bf16."""
    write_folder(model, tokenizer, folder)
    shipped = load_model(folder, device="cpu", dtype=torch.float32)
    return measure(shipped, load_vocabulary(folder, shipped.config), seed)


def write_folder(model: Qwen2VL, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in bf16, config, tokenizer, and the two small files that other programs look for."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_model(deepcopy(model).to(torch.bfloat16), folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, contents in (("generation", ends), ("preprocessor", PREPROCESSOR)):
        (folder / f"{name}_config.json").write_text(json.dumps(contents, indent=2) + "\n")


def _train_tower(config: Qwen2VLConfig, pool: Pool, seed: int) -> dict[str, np.ndarray]:
    """The tower's weights, as arrays for the way back: see `Phantom`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model = Qwen2VL(config)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    width = config.hidden_size
    heads = nn.Linear(width, len(VALUES))  # thrown away afterwards
    nn.init.normal_(heads.weight, 0, width**-0.5, generator=generator)
    nn.init.zeros_(heads.bias)
    learners = nn.ModuleList([model.visual, heads])
    fit("seeing", learners, seeing(model, heads, pool, generator), steps=2000, rate=1e-3)
    return {name: value.numpy() for name, value in model.visual.state_dict().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the base model of the miniature.")
    parser.add_argument("--out", type=Path, required=True, help="for instance miniature/base")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed, another base")
    options = parser.parse_args()
    return run_program("base", partial(make_base, options.out, options.seed))


if __name__ == "__main__":
    sys.exit(main())
