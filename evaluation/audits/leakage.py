"""Find what a test set shares with a training set: images, questions, answers.

    python -m evaluation.audits.leakage build/miniature/train.json build/miniature/test.json

Images are compared by path, by bytes (SHA-256) and by similarity. The distance of two images is
1 - r, where r is the correlation of their slopes: the differences between neighbouring pixels,
across and down, in an upright grey thumbnail of 24 x 24. Slopes are better than pixels, because
bodies look alike at a large scale: of 364,231 pairs of different radiographs, CT and MR slices, the
closest 0.1 % correlate above 0.92 in pixels, but only above 0.70 in slopes. The signs of the slopes
alone (a difference hash) are not enough, because they flip in a dark background: of 256 bits,
copies differ in up to 39, while some different phantoms differ in only 22.

Images at most 0.03 apart are near-duplicates. On 854 real images and the 1,650 phantoms of the
miniature, copies saved as JPEG of quality 60, at half the size, as both, or up to 15 % brighter
(clipped at white) lie within 0.029 of the original. So do 10 of the real pairs, each of which looks
like the same head or knee, and 6 of 1,360,425 pairs of phantoms. Comparing 100,000 training images
with 1,000 test images takes 3 s on one core once they are read.

A near-duplicate should be looked at, but proves nothing: neighbouring slices of one patient may be
as close as copies. A copy that is cropped, mirrored or rotated (other than by its EXIF) is not
found. An image without contrast resembles no other.
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
LISTED = 1000  # pairs in a result, at most
PRINTED = 20  # pairs on the terminal, at most
BLOCK = 2048  # training images compared at once: 8 MB of distances to 1,000 test images
LABELS = {
    "same_path": "image in training, by path",
    "same_bytes": "image in training, same bytes",
    "near_duplicates": "near-duplicate of a training image",
    "same_question": "question and options in training",
}

Pair = dict[str, Any]
PAIR = ("kind", "train", "train_image", "test", "test_image", "distance")
"""The fields of a pair. `train` and `test` name rows; images and distance are None for a pair of
equal questions.
"""
Sources = dict[str, str]
"""Image -> source of the first question that has it."""


def leakage(train: Sequence[Question], test: Sequence[Question]) -> dict[str, Any]:
    """Count and list what the test questions share with the training questions.

    Returns:
        train, test: numbers of questions.
        same_path, same_bytes, near_duplicates: test questions with such an image. An image counts
            only as the first of these that applies. The last two are None if images are missing.
        same_question: test questions whose text and options, in any order, are in training.
        answers_seen: by modality, the share of test questions whose right option was also right in
            training.
        missing_images: image files of either set that don't exist.
        pairs: the first 1,000: the nearest image for each test image, the first question for each
            test question.
        pairs_total: the number of all pairs.

    Raises:
        InputError: an image can't be read.
    """
    known = _images(train)
    tested = _images(test)
    missing = sum(not os.path.isfile(image) for image in known | tested)
    # If any image is missing, none are compared: few pairs would look like a clean test set.
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
    """Pairs of images with the same path, then the same bytes, then near-duplicates, nearest first.
    Without `compare`, only the first kind.
    """
    matches = [("same_path", image, image, 0.0) for image in test if image in train]
    if compare:
        # Reversed, so that the first of equal files is kept.
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
    """The number of test questions with an image of each kind."""
    kind_of = {pair["test_image"]: pair["kind"] for pair in pairs}
    counts: Counter[str] = Counter()
    for question in test:
        # A set, because a question with two images of one kind counts once.
        counts.update({kind_of.get(str(image), "new") for image in question.images})
    return counts


def _digest(image: str) -> bytes:
    return hashlib.sha256(Path(image).read_bytes()).digest()


def _thumbnails(images: Sequence[str]) -> Tensor:
    # disable=None: no bar if stderr is not a terminal.
    bar = tqdm(images, "images", unit="image", leave=False, disable=None)
    return torch.stack([thumbnail(image) for image in bar])


def thumbnail(image: Path | str) -> Tensor:
    """An upright grey thumbnail, uint8 (24, 24). InputError if the image can't be read."""
    grey = load_image(image).convert("L")
    small = grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small))


def nearest_images(test_TSS: Tensor, train_NSS: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the nearest training thumbnail to each test thumbnail, and its distance (0 to
    2). Takes O(T N) time, and memory for T x 2,048 distances.
    """
    slopes_TD = _slopes(test_TSS)
    nearest_T = torch.zeros(len(test_TSS), dtype=torch.int64)
    likeness_T = torch.full((len(test_TSS),), -math.inf)
    for start in range(0, len(train_NSS), BLOCK):
        closest_T, place_T = (slopes_TD @ _slopes(train_NSS[start : start + BLOCK]).T).max(1)
        nearest_T = torch.where(closest_T > likeness_T, start + place_T, nearest_T)
        likeness_T = torch.maximum(likeness_T, closest_T)
    return nearest_T, (1 - likeness_T).clamp(min=0)  # rounding may push a correlation above 1


def _slopes(thumbnails_NSS: Tensor) -> Tensor:
    """Differences between neighbouring pixels, across and down: (N, 2 x 24 x 23). They are centred
    and scaled to length 1, so that their dot products are correlations.
    """
    pixels_NSS = thumbnails_NSS.float()
    across = pixels_NSS.diff(dim=2)
    down = pixels_NSS.diff(dim=1)
    slopes_ND = torch.cat([across.flatten(1), down.flatten(1)], dim=1)
    # Without contrast all slopes are 0 and stay 0: the correlation with any image is 0.
    return normalize(slopes_ND - slopes_ND.mean(1, keepdim=True))


def _same_questions(train: Sequence[Question], test: Sequence[Question]) -> list[Pair]:
    # Reversed, so that the first of equal questions is kept.
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
    # Sorted, because files of the same questions often shuffle the options.
    return plain_text(question.question), *sorted(map(plain_text, question.options))


def summary(result: dict[str, Any]) -> str:
    """The result of `leakage` for the terminal: counts, answers, and the first 20 pairs.
    Unprintable characters other than newlines are escaped.
    """
    lines = ["{test:,} test questions against {train:,} training questions".format(**result)]
    if missing := result["missing_images"]:
        lines.append(f"missing image files: {missing:,}; only paths and text were compared")
    for key, label in LABELS.items():
        count = result[key]
        share = "not compared"
        if count is not None:
            share = f"{count:>6,} {percent(count / result['test']):>6} %"
        lines.append(f"  {label:<46}{share}")
    for modality, rate in result["answers_seen"].items():
        label = f"right option also right in training, {modality}"
        lines.append(f"  {label:<46}{percent(rate):>13} %")
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
