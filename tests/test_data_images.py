"""Images: every kind of file becomes upright 8-bit RGB, with the same patches as transformers."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.errors import InputError
from data.images import MAX_ASPECT_RATIO, fitted_grid, image_size, load_image, preprocess
from model import VisionConfig

VISION = VisionConfig(depth=1, embed_dim=4, num_heads=1)
LIMITS = {"min_pixels": 3136, "max_pixels": 401408}


def noise(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def assert_same_patches(ours, theirs, **limits):
    limits = LIMITS | limits
    patches_SC, grid = preprocess(ours, VISION, **limits)
    expected = Qwen2VLImageProcessorPil(**limits)(images=[theirs], return_tensors="pt")
    assert patches_SC.dtype == torch.float32 and patches_SC.is_contiguous()
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    torch.testing.assert_close(patches_SC, expected["pixel_values"].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "size", [(84, 84), (83, 131), (13, 17), (1, 1), (1, 200), (200, 1), (701, 997), (28, 2000)]
)
def test_patches_equal_transformers_at_odd_sizes(size):
    image = Image.fromarray(noise(*size, 3))
    assert_same_patches(image, image)


def test_patches_equal_transformers_at_other_limits_and_patch_sizes():
    image = Image.fromarray(noise(90, 61, 3))
    assert_same_patches(image, image, min_pixels=20_000, max_pixels=30_000)
    assert_same_patches(image, image, min_pixels=100, max_pixels=1000)
    other = {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 1}
    sizes = {"patch_size": 8, "spatial_merge_size": 3, "temporal_patch_size": 1}
    patches_SC, grid = preprocess(image, replace(VISION, **sizes), **LIMITS)
    expected = Qwen2VLImageProcessorPil(**LIMITS, **other)(images=[image], return_tensors="pt")
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    torch.testing.assert_close(patches_SC, expected["pixel_values"].float(), atol=1e-5, rtol=0)


def palette_with_transparency():
    image = Image.fromarray(noise(50, 70, 3)).quantize(16)
    image.info["transparency"] = 3
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(noise(50, 70)),
        Image.fromarray(noise(50, 70, 4)),
        Image.fromarray(noise(50, 70, 2), "LA"),
        Image.fromarray(noise(50, 70, 3)).quantize(16),
        palette_with_transparency(),
        Image.fromarray(noise(50, 70)).convert("1"),
    ],
    ids=["L", "RGBA", "LA", "P", "P-transparent", "1"],
)
def test_modes_are_converted_as_transformers_does(tmp_path, image):
    path = tmp_path / "image.png"
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    with Image.open(path) as theirs:
        assert_same_patches(loaded, theirs)


def test_transparent_images_get_a_white_background(tmp_path):
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2] = (255, 0, 0, 255)
    Image.fromarray(image).save(tmp_path / "image.png")
    pixels = np.asarray(load_image(tmp_path / "image.png"))
    assert (pixels[:2] == (255, 0, 0)).all() and (pixels[2:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(noise(30, 50, 3))
    upright.save(tmp_path / "image.png", exif=exif)
    loaded = load_image(tmp_path / "image.png")
    assert loaded.size == ((30, 50) if orientation >= 5 else (50, 30))
    with Image.open(tmp_path / "image.png") as theirs:
        assert_same_patches(loaded, ImageOps.exif_transpose(theirs))


def saved_gray(path: Path, values, dtype):
    Image.fromarray(np.asarray(values, dtype=dtype)).save(path)
    loaded = np.asarray(load_image(path))
    assert loaded.dtype == np.uint8 and (loaded == loaded[..., :1]).all()
    return loaded[..., 0]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    loaded = saved_gray(tmp_path / "image.png", values, np.uint16)
    assert (loaded == np.rint(values / 257)).all() and loaded.max() == 255


@pytest.mark.parametrize(
    ("largest", "full"), [(255, 255), (900, 1023), (4095, 4095), (4096, 16383), (20_000, 65535)]
)
def test_twelve_bits_in_sixteen_are_not_black(tmp_path, largest, full):
    values = np.linspace(0, largest, 40 * 40).reshape(40, 40).astype(np.uint16)
    for name in ("image.png", "image.tif"):
        assert (
            saved_gray(tmp_path / name, values, np.uint16) == np.rint(values * (255 / full))
        ).all()


def test_signed_and_float_images_take_their_own_range(tmp_path):
    hounsfield = np.linspace(-1000, 3000, 30 * 30).reshape(30, 30)
    for dtype in (np.int32, np.float32):
        loaded = saved_gray(tmp_path / "image.tif", hounsfield, dtype)
        assert loaded.min() == 0 and loaded.max() == 255 and abs(int(loaded[15, 0]) - 128) <= 1
    assert (saved_gray(tmp_path / "image.tif", np.full((30, 30), -7), np.int32) == 0).all()


def test_exif_rotation_is_applied_to_deep_images_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(
        tmp_path / "image.png", exif=exif
    )
    assert load_image(tmp_path / "image.png").size == (20, 30)


def test_not_a_number_is_refused(tmp_path):
    Image.fromarray(np.full((30, 30), np.nan, np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(InputError, match="image.tif: holds NaN"):
        load_image(tmp_path / "image.tif")


def refused(path, *parts):
    with pytest.raises(InputError) as caught:
        load_image(path)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in (str(path), *parts))


def test_file_that_is_truncated_or_not_an_image_is_one_line(tmp_path):
    path = tmp_path / "image.png"
    refused(path, "no such image")
    for content in (b"", b"not an image\nat all", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        path.write_bytes(content)
        refused(path, "not a readable image")
    for name in ("image.png", "image.jpg", "image.tif"):
        Image.fromarray(noise(200, 200, 3)).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path / name, "not a readable image")
    refused(tmp_path, "not a readable image")


@pytest.mark.parametrize(
    ("side", "limit"),
    [(10_000, "more than 89,478,485 pixels"), (20_000, "exceeds limit of 178956970 pixels")],
    ids=["where Pillow only warns", "where it raises"],
)
def test_decompression_bomb_is_refused_by_its_header(tmp_path, side, limit):
    path = tmp_path / "image.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", side, 10_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 100) + b"IDAT")
    refused(path, limit)
    with pytest.raises(InputError, match=limit):
        image_size(path)


def test_thin_image_is_refused_by_its_aspect_ratio(tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 201)).save(path)
    for read in (load_image, image_size):
        with pytest.raises(
            InputError, match="thin.png: .* 1 x 201 pixels .* aspect ratio over 200"
        ):
            read(path)
    Image.new("RGB", (1, MAX_ASPECT_RATIO)).save(path)
    assert preprocess(load_image(path), VISION, **LIMITS)[1][0] == 1


def test_a_fitted_grid_keeps_to_the_limits():
    for height, width in np.random.default_rng(1).integers(1, 3000, (200, 2)).tolist():
        if max(height, width) <= 20 * min(height, width):
            _, rows, columns = fitted_grid((width, height), VISION, **LIMITS)
            assert rows % 2 == columns % 2 == 0 and 3136 <= rows * columns * 14**2 <= 401408


def test_image_size_is_that_of_the_header(tmp_path):
    Image.new("RGB", (31, 17)).save(tmp_path / "image.png")
    assert image_size(tmp_path / "image.png") == (31, 17)
