"""Questions without their images: substitutes that hide the image from the model.

A trained model that is evaluated on them is its own blind baseline. A model that is trained on them
shows how much of a gain needs no sight. A substitute has the size of the image it replaces, so the
prompt keeps its length.
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
    """Uniform noise of the same size; always the same for a file of the same name."""
    width, height = load_image(path).size
    # Seeded with the name: a single stream would make noise depend on the order of the images.
    generator = np.random.default_rng(list(path.name.encode()))
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_other_images(questions: Sequence[Question]) -> list[Question]:
    """Every question with the images of another question in the list, of any modality.

    All images are still used, and no question keeps its own, unless all have the same images.
    """
    # Distinct: if images occurred twice in the cycle, a question could get its own.
    images = list(dict.fromkeys(question.images for question in questions))
    random.Random("other image").shuffle(images)
    other = dict(zip(images, images[1:] + images[:1], strict=True))  # one cycle through all images
    return [replace(question, images=other[question.images]) for question in questions]


LOADERS: dict[str, LoadImage] = {
    "own": load_image,
    "blank": blank_image,
    "noise": noise_image,
    "other": load_image,  # applied to the questions from `with_other_images`
}
"""How an image file is read for training, by the value of `images` in the config."""
