"""The same steps by TRL's GRPOTrainer with transformers' generate (`pip install -e '.[bench]'`).

Takes the arguments of `benchmarks.grpo_step` and prints a JSON line like its. TRL gets what makes
it fastest here: no gradient checkpointing, one update per rollout, the whole batch at once, no
logging of completions.
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

from .common import WARM_UP, machine, on_checkpoint, peak_memory, program
from .shapes import make_questions


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos, which would need torchvision."""

    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, **_: object
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    def check_argument_for_proper_class(self, name: str, argument: object) -> type:
        return (
            type(argument)
            if argument is None
            else super().check_argument_for_proper_class(name, argument)
        )


class Clock(TrainerCallback):
    """Seconds of each whole step, rollout included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        print(f"TRL step: {self.seconds[-1]:.2f} s", file=sys.stderr)


def letters(completions: Sequence[object], **_: object) -> list[float]:
    """Some reward that differs within a group."""
    return [float(len(str(completion)) % 7) for completion in completions]


def measured_steps(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, object]:
    """As the function of that name in benchmarks/grpo_step.py, without the phases."""
    questions = read_questions(
        make_questions(args.prompts * (args.steps + WARM_UP), args.side, folder)
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt_text(q)}],
            "image": Image.open(q.images[0]).convert("RGB"),
        }
        for q in questions
    ]
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=getattr(torch, args.dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint, max_pixels=args.side**2)
    clock, config = Clock(), model.config
    endless = [config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    trainer = GRPOTrainer(
        model=model,
        processing_class=ImageProcessor(images, tokenizer, tokenizer.chat_template),
        reward_funcs=letters,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=args.prompts * args.group, num_generations=args.group,
            max_completion_length=args.tokens, max_steps=args.steps + WARM_UP, beta=args.beta, temperature=1.0,
            learning_rate=1e-6, gradient_checkpointing=False, bf16=args.dtype == "bfloat16", report_to="none",
            use_cpu=args.device == "cpu", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            generation_kwargs={
                "min_new_tokens": args.tokens, "suppress_tokens": [config.image_token_id, *endless],
            },
        ),
    )  # fmt: skip
    trainer.train()
    seconds = clock.seconds[WARM_UP:]
    result = {
        "seconds_per_step": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
    }
    return result | peak_memory(args.device) | vars(args) | machine(args.device)


if __name__ == "__main__":
    sys.exit(program(lambda: on_checkpoint(measured_steps, "peer_trl", __doc__.split("\n")[0])))
