"""What a test set shares with a training set: images, questions, answers.

    python -m evaluation.audits.leakage build/miniature/train.json build/miniature/test.json

Images are compared by path, by bytes (SHA-256) and by likeness, where 1 - r is the distance of two
images and r the correlation of their slopes: the differences of neighbouring pixels, across and
down, in an upright grey thumbnail of 24 x 24. Slopes and not pixels, because bodies resemble one
another in the large: of 364,231 pairs of different radiographs, CT and MR slices, the closest 0.1 %
correlate above 0.92 in pixels, but above 0.70 in slopes. And not the slopes' signs alone, a
difference hash: in a dark background they flip, so that of 256 bits copies differ in up to 39,
while some different phantoms differ in 22.

Images at most 0.03 apart are near-duplicates. Measured on 854 real images and the 1,650 phantoms of
the miniature: copies as JPEG of quality 60, of half the size, of both, or up to 15 % brighter
(clipped at white) lie within 0.029 of the original. So do 10 of the real pairs, all of what looks
like the same head or knee, and 6 of 1,360,425 pairs of phantoms. 100,000 training images against
1,000 of a test take 3 s on one core once they are read.

A near-duplicate is a finding to look at, not a proof: neighbouring slices of one patient may lie as
close as copies. And a copy that is cropped, mirrored or turned (other than by its EXIF) is not
found. An image without contrast resembles none.
"""

import argparse
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from common.errors import printable
from common.program import run_program
from data import Question, load_image, read_questions

from ..statistics import percent
from .blind import by_modality, plain_text, right_text

SIDE = 24  # pixels of a thumbnail
NEAR = 0.03  # distance up to which two images are near-duplicates
LISTED = 1000  # pairs of a result, at most
PRINTED = 20  # of them on a terminal
BLOCK = 2048  # training images compared at once: 8 MB of distances to 1,000 test images
LABELS = {
    "same_path": "image in training, by path",
    "same_bytes": "image in training, same bytes",
    "near_duplicates": "near-duplicate of a training image",
    "same_question": "question and options in training",
}

Pair = dict[str, Any]
PAIR = ("kind", "train", "train_image", "test", "test_image", "distance")
"""What a pair holds: `train` and `test` name rows; images and distance are None in a pair of equal
questions.
"""
Sources = dict[str, str]
"""By image the source of the first question that has it."""


def leakage(train: Sequence[Question], test: Sequence[Question]) -> dict[str, Any]:
    """How many test questions have what the training questions have, and which.

    Returns:
        train, test: numbers of questions.
        same_path, same_bytes, near_duplicates: test questions with such an image. An image counts
            once, as the first of these that it is. The last two are None where images are missing.
        same_question: test questions whose text and options, in any order, are in training.
        answers_seen: by modality the share of test questions whose right text was right in training
        missing_images: image files of either set that don't exist.
        pairs: the first 1,000: of each test image the nearest, of each test question the first.
        pairs_total: how many there are.

    Raises:
        InputError: an image can't be read.
    """
    known = _images(train)
    tested = _images(test)
    missing = sum(not os.path.isfile(image) for image in known | tested)
    # With some images missing, none are compared: few pairs would look like a clean test set.
    images = _image_pairs(known, tested, compare=not missing)
    texts = _same_questions(train, test)
    pairs = images + texts
    counts = _affected(test, images)
    right = {right_text(question) for question in train}
    is_known = [float(right_text(question) in right) for question in test]
    return {
        "train": len(train),
        "test": len(test),
        "same_path": counts["same_path"],
        "same_bytes": None if missing else counts["same_bytes"],
        "near_duplicates": None if missing else counts["near_duplicate"],
        "same_question": len(texts),
        "answers_seen": by_modality(test, {"known": is_known})["known"],
        "missing_images": missing,
        "pairs": pairs[:LISTED],
        "pairs_total": len(pairs),
    }


def _images(questions: Sequence[Question]) -> Sources:
    sources: Sources = {}
    for question in questions:
        for image in question.images:
            sources.setdefault(str(image), question.source)
    return sources


def _image_pairs(train: Sources, test: Sources, compare: bool) -> list[Pair]:
    """Images of the same path, then of the same bytes, then near-duplicates, nearest first; only
    the first without `compare`.
    """
    matches = [("same_path", image, image, 0.0) for image in test if image in train]
    if compare:
        # Backwards: of equal files the first is kept.
        by_digest = {_digest(image): image for image in reversed(train)}
        others = []
        for image in test:
            if image in train:
                continue
            same = by_digest.get(_digest(image))
            if same:
                matches.append(("same_bytes", same, image, 0.0))
            else:
                others.append(image)
        matches += _near_duplicates(list(train), others)
    pairs = []
    for kind, old, new, distance in matches:
        pairs.append(_pair(kind, train[old], old, test[new], new, distance))
    return pairs


def _near_duplicates(train: list[str], test: list[str]) -> list[tuple[str, str, str, float]]:
    if not test:
        return []
    nearest, distances = nearest_images(_thumbnails(test), _thumbnails(train))
    matches = []
    for at in distances.argsort(stable=True).tolist():  # stable: ties in the order of the test set
        distance = float(distances[at])
        if distance <= NEAR:
            matches.append(("near_duplicate", train[nearest[at]], test[at], round(distance, 4)))
    return matches


def _affected(test: Sequence[Question], pairs: list[Pair]) -> Counter[str]:
    """By kind the number of test questions with such an image."""
    kind_of = {pair["test_image"]: pair["kind"] for pair in pairs}
    counts: Counter[str] = Counter()
    for question in test:
        # A set, as two images of one kind still make one question.
        counts.update({kind_of.get(str(image), "new") for image in question.images})
    return counts


def _digest(image: str) -> bytes:
    return hashlib.sha256(Path(image).read_bytes()).digest()


def _thumbnails(images: Sequence[str]) -> Tensor:
    # disable=None: no bar where nobody watches, that is, where stderr is no terminal.
    bar = tqdm(images, "images", unit="image", leave=False, disable=None)
    return torch.stack([thumbnail(image) for image in bar])


def thumbnail(image: Path | str) -> Tensor:
    """Upright, grey, uint8 (24, 24), whatever the image's shape. Raises InputError."""
    grey = load_image(image).convert("L")
    small = grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small))


def nearest_images(test_TSS: Tensor, train_NSS: Tensor) -> tuple[Tensor, Tensor]:
    """Of each test thumbnail the index of a nearest one of training, and its distance (0 to 2).

    Takes T x N time, and memory for T x 2,048 distances.
    """
    slopes_TD = _slopes(test_TSS)
    nearest_T = torch.zeros(len(test_TSS), dtype=torch.int64)
    likeness_T = torch.full((len(test_TSS),), -math.inf)
    for start in range(0, len(train_NSS), BLOCK):
        closest_T, place_T = (slopes_TD @ _slopes(train_NSS[start : start + BLOCK]).T).max(1)
        nearest_T = torch.where(closest_T > likeness_T, start + place_T, nearest_T)
        likeness_T = torch.maximum(likeness_T, closest_T)
    return nearest_T, (1 - likeness_T).clamp(min=0)  # rounding may take a correlation above 1


def _slopes(thumbnails_NSS: Tensor) -> Tensor:
    """Differences of neighbours, across and down, less their mean and scaled to length 1, so that
    dot products correlate: (N, 2 x 24 x 23).
    """
    pixels_NSS = thumbnails_NSS.float()
    across = pixels_NSS.diff(dim=2)
    down = pixels_NSS.diff(dim=1)
    slopes_ND = torch.cat([across.flatten(1), down.flatten(1)], dim=1)
    # Without contrast all slopes are 0, and stay so: like those of no other image.
    return normalize(slopes_ND - slopes_ND.mean(1, keepdim=True))


def _same_questions(train: Sequence[Question], test: Sequence[Question]) -> list[Pair]:
    # Backwards: of equal questions the first is kept.
    sources = {_text(question): question.source for question in reversed(train)}
    pairs = []
    for question in test:
        same = sources.get(_text(question))
        if same:
            pairs.append(_pair("same_question", same, None, question.source, None, None))
    return pairs


def _pair(*values: Any) -> Pair:
    return dict(zip(PAIR, values, strict=True))


def _text(question: Question) -> tuple[str, ...]:
    # Sorted, as files of the same questions often shuffle the options.
    return plain_text(question.question), *sorted(map(plain_text, question.options))


def summary(result: dict[str, Any]) -> str:
    """What `leakage` returns, for a terminal: counts, answers, the first 20 pairs; nothing
    unprintable but newlines.
    """
    lines = ["{test:,} test questions against {train:,} training questions".format(**result)]
    if missing := result["missing_images"]:
        lines.append(f"missing image files: {missing:,}; only paths and text were compared")
    for key, label in LABELS.items():
        count = result[key]
        share = "not compared"
        if count is not None:
            share = f"{count:>6,} {percent(count / result['test']):>6} %"
        lines.append(f"  {label:<38}{share}")
    for modality, rate in result["answers_seen"].items():
        label = f"right answer seen in training, {modality}"
        lines.append(f"  {label:<38}{percent(rate):>13} %")
    for pair in result["pairs"][:PRINTED]:
        line = pair["kind"].replace("_", " ")
        if pair["distance"]:  # 0 for the same file, None for questions
            line += ", distance {distance:.3f}".format(**pair)
        rows = []
        for side in ("test", "train"):
            image = pair[f"{side}_image"]
            rows.append(f"{pair[side]} ({Path(image).name})" if image else pair[side])
        lines.append(f"{line}: {' - '.join(rows)}")
    if result["pairs_total"] > PRINTED:
        lines.append(f"and {result['pairs_total'] - PRINTED:,} more")
    return "\n".join(map(printable, lines))  # paths and modalities come from files


def main() -> int:
    return run_program("leakage", _print_leakage)


def _print_leakage() -> None:
    parser = argparse.ArgumentParser("leakage", description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path, help="question file of the training set")
    parser.add_argument("test", type=Path, help="question file of the test set")
    parser.add_argument(
        "--image_dir",
        type=Path,
        help="folder of both files' images; default: each file's own folder",
    )
    given = parser.parse_args()
    # Missing images are counted, not refused: paths and text can be compared without them.
    train = read_questions(given.train, given.image_dir, check_images=False)
    test = read_questions(given.test, given.image_dir, check_images=False)
    print(summary(leakage(train, test)))


if __name__ == "__main__":
    sys.exit(main())
