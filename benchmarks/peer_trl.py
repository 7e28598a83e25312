"""Time the same steps with TRL's GRPOTrainer and transformers' generate.

Needs `pip install -e '.[bench]'`. Takes the arguments of `benchmarks.grpo_step` and prints the same
kind of JSON line. TRL gets the settings that are fastest here: no gradient checkpointing, one
update per rollout, the whole batch at once, no logging of completions.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from trl import GRPOConfig, GRPOTrainer

from data import prompt_text, read_questions
from model import read_config

from .common import WARM_UP, machine, peak_memory, run_measurement
from .shapes import make_questions


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video processor, which would need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_: object):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    def check_argument_for_proper_class(self, name: str, argument: object) -> type:
        if argument is None:  # the video processor
            return type(None)
        return super().check_argument_for_proper_class(name, argument)


class Clock(TrainerCallback):
    """Records the seconds of each whole step, rollout included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        # Kernels are queued: the step ends when the last one is done.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        print(f"TRL step: {self.seconds[-1]:.2f} s", file=sys.stderr)


def letters(completions: Sequence[object], **_: object) -> list[float]:
    """An arbitrary reward that differs within a group."""
    return [float(len(str(completion)) % 7) for completion in completions]


def trl_config(args: argparse.Namespace, folder: Path, forbidden: list[int]) -> GRPOConfig:
    """TRL's settings for the steps that the arguments describe."""
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=args.prompts * args.group,
        num_generations=args.group,
        max_completion_length=args.tokens,
        max_steps=args.steps + WARM_UP,
        beta=args.beta,
        temperature=1.0,
        learning_rate=1e-6,
        gradient_checkpointing=False,  # it would cost another forward pass
        bf16=args.dtype == "bfloat16",
        report_to="none",
        use_cpu=args.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,  # keep stdout for the line of JSON
        generation_kwargs={"min_new_tokens": args.tokens, "suppress_tokens": forbidden},
    )


def measured_steps(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, object]:
    """Like the function of that name in benchmarks/grpo_step.py, without times by phase."""
    file = make_questions(args.prompts * (args.steps + WARM_UP), args.side, folder)
    rows = []
    for question in read_questions(file):
        chat = [{"role": "user", "content": prompt_text(question)}]
        rows.append({"prompt": chat, "image": Image.open(question.images[0]).convert("RGB")})
    dtype, load = getattr(torch, args.dtype), Qwen2VLForConditionalGeneration.from_pretrained
    model = load(checkpoint, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # TRL pads with it, but the tokenizer may have none.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint, max_pixels=args.side**2)
    forbidden = read_config(checkpoint).vision_token_ids
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        processing_class=ImageProcessor(images, tokenizer, tokenizer.chat_template),
        reward_funcs=letters,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=trl_config(args, folder, forbidden),
    )
    trainer.train()
    seconds = clock.seconds[WARM_UP:]
    return {
        "seconds_per_step": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        **peak_memory(args.device),
        **vars(args),
        **machine(args.device),
    }


if __name__ == "__main__":
    sys.exit(run_measurement("peer_trl", __doc__.split("\n")[0], measured_steps))
