"""What all tests share: one thread, and some prompts."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from faults_page import show
from PIL import Image
from tiny import tiny_tokenizer
from tiny_run import tiny_model

from data import Prompt, PromptEncoder, Question

# Tiny matrices only wait for a second thread. The variable is for the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Under nohup it is ignored, and a run rightly goes on; the tests of a stop are not about that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """No image, one image, two images; prompts of different lengths."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for i, size in enumerate([(60, 60), (90, 40), (56, 112)]):
        paths.append(folder / f"{i}.png")
        Image.effect_noise(size, 80).save(paths[-1])
    encoder = tiny_encoder()
    images: list[tuple[Path, ...]] = [(), (paths[0],), (paths[1], paths[2])]
    words = ["Which?", "What is seen in this image?", "What?"]
    return [
        encoder.encode(Question(i, w, ("Mass", "Normal"), "A", "MRI", "", w))
        for i, w in zip(images, words, strict=True)
    ]


def tiny_encoder() -> PromptEncoder:
    """For the tiny tokenizer's checkpoints."""
    return PromptEncoder(
        tiny_tokenizer(),
        tiny_model().config,
        min_pixels=3136,
        max_pixels=10000,
        max_prompt_tokens=2000,
    )


@pytest.fixture
def in_docs(tmp_path: Path) -> Callable[..., None]:
    """`in_docs(row, text)` hands the message in `text` over to its row of docs/faults.md."""
    return partial(_show, tmp_path)


def _show(tmp_path: Path, row: str, text: str, folder: Path | None = None) -> None:
    show(row, text, folder or tmp_path)
