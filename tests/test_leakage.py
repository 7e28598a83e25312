"""Leakage between question files, by construction, with small real images."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from common.errors import InputError
from data import Question
from evaluation.audits import leakage as module
from evaluation.audits.leakage import leakage, nearest_images, summary, thumbnail


def picture(seed, size=96):
    """Blobs on black; two seeds differ as much as two organs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    blobs = [
        rng.uniform(40, 110)
        * np.exp(-((x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.8)) ** 2) / width)
        for width in rng.uniform(0.002, 0.02, 8)
    ]
    return Image.fromarray(
        np.clip(sum(blobs) + rng.normal(0, 2, (size, size)), 0, 255).astype(np.uint8)
    )


@pytest.fixture
def scan(tmp_path):
    """scan(3) or scan(3, "name.png"): the path of picture 3, saved once."""

    def _scan(seed, name=None):
        file = tmp_path / (name or f"{seed}.png")
        picture(seed).save(file)
        return file

    return _scan


def question(
    *images, text="What?", options=("cyst", "mass"), answer="A", modality="MRI", source="row"
):
    return Question(images, text, options, answer, modality, "", source)


def alone(image, number, **fields):
    """A question with a unique text, so that only its image can be in training."""
    return question(image, text=f"What {number}?", source=f"row {number}", **fields)


def found(train, test):
    result = leakage(train, test)
    return result, [(pair["kind"], pair["train"], pair["test"]) for pair in result["pairs"]]


KEPT = {
    "JPEG of quality 60": lambda image, file: image.save(file, "JPEG", quality=60),
    "half the size": lambda image, file: image.resize((48, 48)).save(file, "PNG"),
    "10 % brighter": lambda image, file: (
        ImageEnhance.Brightness(image).enhance(1.1).save(file, "PNG")
    ),
    "in colour": lambda image, file: image.convert("RGB").save(file, "PNG"),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_copy_that_was_saved_again_is_found_among_others(scan, tmp_path, name):
    train = [alone(scan(seed), seed) for seed in range(6)]
    KEPT[name](picture(4), tmp_path / "copy")
    test = [alone(scan(2, "same bytes.png"), 92), alone(scan(50), 91), alone(tmp_path / "copy", 90)]
    result, pairs = found(train, test)
    assert pairs == [("same_bytes", "row 2", "row 92"), ("near_duplicate", "row 4", "row 90")]
    assert (result["same_path"], result["same_bytes"], result["near_duplicates"]) == (0, 1, 1)
    assert 0 <= result["pairs"][1]["distance"] <= module.NEAR


def test_a_copy_rotated_by_its_exif_is_found(scan, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees, clockwise
    picture(1).transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "turned.jpg", exif=exif, quality=95
    )
    assert (
        found([alone(scan(1), 1)], [alone(tmp_path / "turned.jpg", 2)])[0]["near_duplicates"] == 1
    )


def test_images_of_different_scenes_are_not_near(scan):
    thumbnails = torch.stack([thumbnail(scan(seed)) for seed in range(40)])
    for at, one in enumerate(thumbnails):
        others = torch.cat((thumbnails[:at], thumbnails[at + 1 :]))
        _, distances = nearest_images(one[None], others)
        assert distances[0] > 2 * module.NEAR


def test_an_image_counts_once_as_the_strongest_kind(scan, tmp_path):
    known, copy = scan(1), tmp_path / "other name.png"
    shutil.copy(known, copy)
    again = tmp_path / "again.png"
    shutil.copy(known, again)
    train = [alone(scan(0), 0), alone(known, 1), alone(known, 2), alone(again, 3)]
    result, pairs = found(
        train, [alone(copy, 11), alone(known, 12), alone(known, 13), alone(scan(9), 14)]
    )
    assert pairs == [("same_path", "row 1", "row 12"), ("same_bytes", "row 1", "row 11")]
    assert (result["same_path"], result["same_bytes"], result["near_duplicates"]) == (2, 1, 0)
    assert [(pair["train_image"], pair["test_image"]) for pair in result["pairs"]] == [
        (str(known), str(known)),
        (str(known), str(copy)),
    ]


def test_a_question_counts_once_however_many_of_its_images_are_known(scan):
    train = [alone(scan(0), 0), question(scan(1), scan(2), text="Which?")]
    test = [
        question(scan(7), scan(2)),
        question(scan(0), scan(1), text="Where?"),
        question(scan(8), text="Who?"),
    ]
    assert found(train, test)[0]["same_path"] == 2


def test_the_nearest_image_is_found_across_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    train = torch.randint(256, (11, 24, 24), generator=torch.Generator().manual_seed(0))
    order = [10, 3, 0, 7, 7]
    nearest, distances = nearest_images(train[order], train)
    assert nearest.tolist() == order and distances.max() < 1e-6


def test_images_without_contrast_match_nothing_and_hide_no_match(scan, tmp_path):
    for name, value in (("black.png", 0), ("grey.png", 90)):
        Image.new("L", (30, 30), value).save(tmp_path / name)
    train = [alone(tmp_path / "black.png", 1), alone(scan(1), 2)]
    copy = tmp_path / "copy.jpg"
    picture(1).save(copy)
    assert found(train, [alone(tmp_path / "grey.png", 3), alone(copy, 4)])[1] == [
        ("near_duplicate", "row 2", "row 4")
    ]


def test_each_image_is_decoded_once(scan, monkeypatch):
    seen = []
    real = module.load_image
    monkeypatch.setattr(module, "load_image", lambda path: seen.append(path) or real(path))
    train = [alone(scan(seed), seed) for seed in (0, 1, 0, 1)]
    found(train, [alone(scan(seed), 10 + seed) for seed in (5, 0, 5)])
    assert len(seen) == len(set(seen)) == 3


def test_a_question_is_the_same_with_its_options_in_any_order_and_with_another_answer():
    same = {"text": "What is it?", "options": ("Cyst", "Mass.", "rib")}
    train = [
        question(**same, source="first"),
        question(source="other"),
        question(**same, source="second"),
    ]
    test = [
        question(text="what is  it?", options=("rib", "cyst", "mass"), answer="C", source="a"),
        question(text="What is it?", options=("cyst", "mass"), source="b"),
        question(text="What is that?", options=("Cyst", "Mass.", "rib"), source="c"),
    ]
    result, pairs = found(train, test)
    assert pairs == [("same_question", "first", "a")]
    assert result["same_question"] == 1 and (result["train"], result["test"]) == (3, 3)


def test_answers_are_seen_only_if_they_were_right_in_training():
    train = [
        question(options=("cyst", "mass"), answer="B"),
        question(options=("rib", "lung"), answer="A"),
    ]
    test = [
        question(options=("spine", "Mass."), answer="B"),
        question(options=("rib", "cyst"), answer="B"),
        question(options=("rib", "cyst"), answer="A", modality="CT"),
    ]
    assert found(train, test)[0]["answers_seen"] == {"MRI": 0.5, "CT": 1.0}


def test_missing_images_are_reported_and_not_mistaken_for_a_clean_set(scan, tmp_path):
    gone = tmp_path / "gone.png"
    result, pairs = found([alone(gone, 1), alone(scan(1), 2)], [alone(gone, 3), alone(scan(2), 4)])
    assert pairs == [("same_path", "row 1", "row 3")]
    assert result["missing_images"] == 1 and result["same_path"] == 1
    assert result["same_bytes"] is None and result["near_duplicates"] is None
    lines = summary(result).splitlines()
    assert "missing image files: 1; only paths and text were compared" in lines


def test_a_broken_image_is_a_one_line_error(scan, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="broken.png") as caught:
        leakage([alone(tmp_path / "broken.png", 1)], [alone(scan(1), 2)])
    assert "\n" not in str(caught.value)


def test_long_lists_are_truncated_and_say_so():
    train = [question(text=f"What {number}?", source=f"row {number}") for number in range(1200)]
    result, pairs = found(train, train)
    assert len(pairs) == 1000 and result["pairs_total"] == result["same_question"] == 1200
    lines = summary(result).splitlines()
    assert (
        lines[-1] == "and 1,180 more"
        and sum(line.startswith("same question: ") for line in lines) == 20
    )
    json.dumps(result)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["leakage", *map(str, arguments)])
    return module.main()


def test_command_reads_two_files_and_escapes_their_content(scan, tmp_path, monkeypatch, capsys):
    scan(1), scan(1, "\x1b[2J.png")
    row = {
        "question": "What?",
        "options": ["cyst", "mass"],
        "answer": "mass",
        "modality": "CT\n\x1b",
    }
    for name, image in (("train", "1.png"), ("test", "\x1b[2J.png")):
        (tmp_path / f"{name}.json").write_text(json.dumps([row | {"image": [image]}]))
    assert run(monkeypatch, tmp_path / "train.json", tmp_path / "test.json") == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert (
        "same bytes: test.json row 1 (\\x1b[2J.png) - train.json row 1 (1.png)" in text.splitlines()
    )
    assert "only paths and text" not in text
    assert (
        run(
            monkeypatch,
            tmp_path / "train.json",
            tmp_path / "test.json",
            "--image_dir",
            tmp_path / "none",
        )
        == 0
    )
    assert "missing image files: 2;" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path / "train.json", tmp_path / "gone.json") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("leakage: ") and errors.count("\n") == 1
