"""Load an image file and cut it into the patches that the vision tower reads.

The result equals that of transformers' Pillow image processor (`Qwen2VLImageProcessorPil`): the
same sizes, bicubic resampling, normalisation and order of patches. Departures, all in `load_image`:
the EXIF rotation is applied. An image of more than 8 bits is scaled to 8 bits, where Pillow would
clip it. A file beyond Pillow's pixel limit is refused, and so is every unusual format: for some of
them Pillow runs another program (EPS), and the others are untested.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import InputError, reason
from common.files import check_file
from model import VisionConfig

Grid = tuple[int, int, int]
"""An image's grid of patches, (1, rows, columns). For a video, the 1 would be half its frames."""

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200  # as in transformers
# Recognised by content, not by file name. MPO counts as JPEG.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_BIT_DEPTHS = (8, 10, 12, 14, 16)  # the usual values of "bits stored" in DICOM
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we raise an error


def load_image(path: Path | str) -> Image.Image:
    """Load an image as upright 8-bit RGB.

    Transparent images get a white background. Integers of up to 16 bits are scaled from the
    smallest usual bit depth (8, 10, 12, 14 or 16) that holds the image's largest value: scanners
    store 12 bits in 16-bit files, which would turn black if all 16 were assumed. Integers outside
    0..65535 (Hounsfield units) and floats have no standard range, so their own minimum and maximum
    become 0 and 255.

    Raises:
        InputError: the file is missing, truncated or not an image of a usual format, or the image
            has too many pixels, is too thin, or holds NaN or infinity.
    """
    with _opened(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            return _from_deep(image, path).convert("RGB")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) from the file's header, before any EXIF rotation. Raises InputError."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """The image, not decoded yet. Any error while it is used becomes an InputError that names the
    file.
    """
    try:
        check_file(path)
        with Image.open(path, formats=_FORMATS) as image:
            _check_size(*image.size, path)
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except Exception as error:  # on a damaged file, decoders raise all kinds of errors
        raise InputError(
            f"{path}: not a readable image ({reason(error)}): replace the file"
        ) from None


def _check_size(width: int, height: int, path: Path | str) -> None:
    # Pillow itself only warns up to twice its limit. Turning the warning into an error is not an
    # option: several threads load images, and warning filters are shared by all threads.
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if width * height > limit:
        raise InputError(
            f"{path}: the image has more than {limit:,} pixels, the limit: use a smaller copy"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"{path}: an image of {width} x {height} pixels has an aspect ratio over "
            f"{MAX_ASPECT_RATIO}: crop or pad it"
        )


def _from_deep(image: Image.Image, path: Path | str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds NaN or infinite pixels: replace the file")
    low, high = values.min(), values.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, next(2**bits - 1 for bits in _BIT_DEPTHS if high < 2**bits)
    scale = 255 / ((high - low) or 1)  # 1: an image of one value becomes black
    scaled = (values - low) * scale
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def fitted_grid(
    size: tuple[int, int], vision: VisionConfig, min_pixels: int, max_pixels: int
) -> Grid:
    """The grid of an image of this (width, height) after resizing.

    It has whole tokens, an area within the limits, and almost the same aspect ratio: exactly the
    result of Qwen2-VL's `smart_resize`.
    """
    factor = vision.patch_size * vision.spatial_merge_size
    width, height = size
    sides = height, width
    # This rounds half to even, as `smart_resize` does. If a side becomes 0, the area is too small.
    fitted = [round(side / factor) * factor for side in sides]
    if math.prod(fitted) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    elif math.prod(fitted) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted = [math.ceil(side * grow / factor) * factor for side in sides]
    return 1, fitted[0] // vision.patch_size, fitted[1] // vision.patch_size


def preprocess(
    image: Image.Image, vision: VisionConfig, min_pixels: int, max_pixels: int
) -> tuple[Tensor, Grid]:
    """Resize and normalise an image, and cut it into patches.

    Args:
        image: RGB, from `load_image`.
        vision: config of the vision tower, for its patch sizes.
        min_pixels, max_pixels: limits on the area of the resized image.

    Returns:
        patches_SC, float32 (S, 3 * temporal * patch * patch), in which the merge x merge patches of
        a token are adjacent; and the grid of patches.
    """
    size, merge = vision.patch_size, vision.spatial_merge_size
    grid = fitted_grid(image.size, vision, min_pixels, max_pixels)
    _, rows, columns = grid
    resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    pixels_HWC = np.asarray(resized, dtype=np.float32) / 255
    mean, std = np.array((MEAN, STD), dtype=np.float32)
    pixels_HWC = (pixels_HWC - mean) / std
    blocks = torch.from_numpy(pixels_HWC).reshape(
        rows // merge, merge, size, columns // merge, merge, size, 3
    )
    # -> block row, block column, row and column in the block, channel, (frame,) y, x
    blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5)
    # A still image fills all frames of a patch.
    blocks = torch.stack([blocks] * vision.temporal_patch_size, dim=5)
    return blocks.reshape(rows * columns, -1), grid
