"""From an image file to the patches that the vision tower reads.

Equal to the Pillow image processor of transformers (`Qwen2VLImageProcessorPil`): the same sizes,
bicubic resampling, normalisation and order of patches. Departures, all in `load_image`: the EXIF
rotation is applied; an image of more than 8 bits is scaled to 8 bits where Pillow would clip it; a
file beyond Pillow's limit of pixels is refused, and so is every format but the usual ones, because
for some Pillow runs another program (EPS) and others nobody has tested.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common.errors import InputError
from common.files import check_file

PATCH_SIZE = 14  # pixels along a side of a patch
MERGE_SIZE = 2  # patches along a side of what becomes one token
TEMPORAL_PATCH_SIZE = 2  # frames in a patch; a still image fills both
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our error says it
_FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "TIFF",
    "WEBP",
    "PPM",
    "JPEG2000",
)  # told apart by contents; MPO goes as JPEG
_BIT_DEPTHS = (8, 10, 12, 14, 16)  # those of DICOM's "bits stored"


def load_image(path: Path | str) -> Image.Image:
    """An upright 8-bit RGB image.

    Transparency is laid on white. Integers of up to 16 bits are scaled from the smallest usual bit
    depth (8, 10, 12, 14 or 16) that holds the image's largest value, because scanners store 12 bits
    in files of 16, which would turn black if all 16 were assumed. Integers outside 0..65535
    (Hounsfield units) and floats have no agreed range: their own minimum and maximum become 0 and
    255.

    Raises:
        InputError: the file is missing, is no image of a usual format, is truncated, has too many
            pixels or holds NaN or infinity.
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
    """(width, height) as the file's header has it, before any EXIF rotation; decodes no pixel.
    Raises InputError.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """The image, not decoded yet. Whatever is raised while it is used becomes an InputError that
    names the file.
    """
    try:
        check_file(path)
        with Image.open(path, formats=_FORMATS) as image:
            # Pillow refuses twice that limit by itself. Warnings made into errors would be no help:
            # several threads load images, and the filters of warnings are common to all.
            if math.prod(image.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):  # the latter where the user's filters say so
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise InputError(
            f"{path}: more than {limit}, which is not decoded: give a smaller copy"
        ) from None
    except (
        Exception
    ) as error:  # raised again as InputError: a damaged file makes decoders raise whatever there is
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: not a readable image ({reason}): replace the file") from None


def _from_deep(image: Image.Image, path: Path | str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds NaN or infinite pixels: replace the file")
    low, high = values.min(), values.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, next(2**bits - 1 for bits in _BIT_DEPTHS if high < 2**bits)
    scaled = (values - low) * (255 / ((high - low) or 1))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def fitted_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) to resize to: multiples of `factor`, an area within the limits, nearly the
    same shape.

    The `smart_resize` of Qwen2-VL, to the pixel.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            f"an image of {width} x {height} pixels has an aspect ratio over {MAX_ASPECT_RATIO}: crop or pad it"
        )
    fitted_height, fitted_width = round(height / factor) * factor, round(width / factor) * factor
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_height = max(factor, math.floor(height / shrink / factor) * factor)
        fitted_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif fitted_height * fitted_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted_height = math.ceil(height * grow / factor) * factor
        fitted_width = math.ceil(width * grow / factor) * factor
    return fitted_height, fitted_width


def preprocess(
    image: Image.Image,
    min_pixels: int,
    max_pixels: int,
    patch_size: int = PATCH_SIZE,
    merge_size: int = MERGE_SIZE,
    temporal_patch_size: int = TEMPORAL_PATCH_SIZE,
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Resize, normalise and cut into patches.

    Args:
        image: RGB, as `load_image` gives it.
        min_pixels, max_pixels: limits of the resized image's area.

    Returns:
        patches_SC, float32 (S, 3 * temporal * patch * patch), where each merge x merge patches that
        become one token are neighbours, and the grid (1, rows, columns) of patches.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    height, width = fitted_size(
        image.height, image.width, patch_size * merge_size, min_pixels, max_pixels
    )
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels_HWC = np.asarray(resized, dtype=np.float32) / 255
    pixels_HWC = (pixels_HWC - np.float32(MEAN)) / np.float32(STD)
    rows, columns = height // patch_size, width // patch_size
    blocks = torch.from_numpy(pixels_HWC).reshape(
        rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size, 3
    )
    # -> block row, block column, row and column in the block, channel, frame, y, x
    blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)
    blocks = blocks.expand(-1, -1, -1, -1, -1, temporal_patch_size, -1, -1)
    return blocks.reshape(rows * columns, -1), (1, rows, columns)
