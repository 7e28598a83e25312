"""Questions without their images: what a model that can't see would be shown in their place.

Asked so, a trained model is its own blind baseline; trained so, it shows how much of a gain needs
no sight. The prompt keeps its length: every substitute has the size of the image that it replaces.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from .encode import LoadImage
from .images import load_image
from .question import Question


def blank_image(path: Path) -> Image.Image:
    """A grey image of the same size."""
    return Image.new("RGB", load_image(path).size, (128, 128, 128))


def noise_image(path: Path) -> Image.Image:
    """Uniform noise of the same size, the same each time for a file of that name."""
    width, height = load_image(path).size
    # Seeded with the name and not in a row: noise must not depend on what was asked before.
    generator = np.random.default_rng(list(path.name.encode()))
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_other_images(questions: Sequence[Question]) -> list[Question]:
    """Every question with the images of another one of the list, of whatever modality.

    All images are still used, and nobody keeps its own, unless all questions show the same.
    """
    # Distinct: with an image twice in the cycle, a question could be given its own.
    images = list(dict.fromkeys(question.images for question in questions))
    random.Random("other image").shuffle(images)
    other = dict(zip(images, images[1:] + images[:1], strict=True))  # one cycle through them all
    return [replace(question, images=other[question.images]) for question in questions]


LOADERS: dict[str, LoadImage] = {
    "own": load_image,
    "blank": blank_image,
    "noise": noise_image,
    "other": load_image,  # of the questions that `with_other_images` gives
}
"""By the values of the config's `images`: how an image file is read for training."""
