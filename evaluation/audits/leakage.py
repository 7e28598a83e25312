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
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import InputError, printable
from data import Question, load_image, read_questions

from .blind import plain_text, right_index

SIDE = 24  # pixels of a thumbnail
NEAR = 0.03  # distance up to which two images are near-duplicates
LISTED = 1000  # pairs of a result, at most
PRINTED = 20
BLOCK = 2048  # images compared at once: 2,048 x 2,048 distances take 17 MB

Shown = dict[Path, str]
"""Each image once, with the source of the first question that shows it."""


def leakage(
    train: Sequence[Question], test: Sequence[Question], progress: bool = True
) -> dict[str, Any]:
    """How many test questions have what the training questions have, and which.

    Args:
        progress: whether to show a bar on stderr while images are read.

    Returns:
        train, test: numbers of questions.
        same_path, same_bytes, near_duplicates: test questions with such an image. An image counts
            once, as the first of these that it is. The last two are None where images are missing
            and so were not compared.
        same_question: test questions whose text and options, in any order, are those of a training
            question.
        answers_seen: by modality the share of test questions whose right option's text was right in
            training.
        missing_images: image files of either set that don't exist.
        pairs: the first 1,000 of {"kind", "train", "train_image", "test", "test_image",
            "distance"}: of each test image the nearest training image, of each test question the
            first equal one. `train` and `test` name rows.
        pairs_total: how many there are.

    Raises:
        InputError: an image can't be read.
    """
    train_images, test_images = _shown(train), _shown(test)
    missing = sum(not os.path.isfile(image) for image in train_images.keys() | test_images.keys())
    pairs = list(_same_paths(train_images, test_images))
    if not missing:
        pairs += _alike(train_images, test_images, progress)
    pairs += _same_questions(train, test)
    return {
        "train": len(train),
        "test": len(test),
        "same_path": _touched(test, pairs, "same_path"),
        "same_bytes": None if missing else _touched(test, pairs, "same_bytes"),
        "near_duplicates": None if missing else _touched(test, pairs, "near_duplicate"),
        "same_question": sum(pair["kind"] == "same_question" for pair in pairs),
        "answers_seen": _answers_seen(train, test),
        "missing_images": missing,
        "pairs": pairs[:LISTED],
        "pairs_total": len(pairs),
    }


def _shown(questions: Sequence[Question]) -> Shown:
    shown: Shown = {}
    for question in questions:
        for image in question.images:
            shown.setdefault(image, question.source)
    return shown


def _pair(
    kind: str, train: tuple[Path, str], test: tuple[Path, str], distance: float
) -> dict[str, Any]:
    (train_image, train_source), (test_image, test_source) = train, test
    return {
        "kind": kind,
        "train": train_source,
        "train_image": str(train_image),
        "test": test_source,
        "test_image": str(test_image),
        "distance": round(distance, 4),
    }


def _same_paths(train: Shown, test: Shown) -> Iterator[dict[str, Any]]:
    for image, source in test.items():
        if image in train:
            yield _pair("same_path", (image, train[image]), (image, source), 0.0)


def _alike(train: Shown, test: Shown, progress: bool) -> list[dict[str, Any]]:
    """Pairs of the same bytes and near-duplicates, nearest first, of test images that are not in
    training by path.
    """
    known, new = list(train.items()), [item for item in test.items() if item[0] not in train]
    if not known or not new:
        return []
    images = [image for image, _ in (*known, *new)]
    bar = tqdm(
        images, "images", unit="image", dynamic_ncols=True, leave=False, disable=not progress
    )
    digests, thumbnails = _fingerprints(bar)
    first = {digest: index for index, digest in reversed(list(enumerate(digests[: len(known)])))}
    copies, others = [], []
    for index, digest in enumerate(digests[len(known) :]):
        (copies if digest in first else others).append(index)
    pairs = [
        _pair("same_bytes", known[first[digests[len(known) + index]]], new[index], 0.0)
        for index in copies
    ]
    nearest, distances = nearest_images(thumbnails[len(known) :][others], thumbnails[: len(known)])
    for at in np.argsort(distances, kind="stable"):
        if distances[at] <= NEAR:
            pairs.append(
                _pair("near_duplicate", known[nearest[at]], new[others[at]], float(distances[at]))
            )
    return pairs


def _fingerprints(images: Iterable[Path]) -> tuple[list[bytes], np.ndarray]:
    """Of each image the digest of its file and its grey thumbnail, uint8 (N, 24, 24); each file is
    decoded once.
    """
    digests, thumbnails = [], []
    for image in images:
        thumbnails.append(thumbnail(image))
        digests.append(hashlib.sha256(image.read_bytes()).digest())
    return digests, np.stack(thumbnails)


def thumbnail(image: Path) -> np.ndarray:
    """Upright, grey, uint8 (24, 24), whatever the image's shape. Raises InputError."""
    grey = load_image(image).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def nearest_images(test_TSS: np.ndarray, train_NSS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each test thumbnail the index of a nearest one of training, and its distance (0 to 2).

    Takes T x N time, and memory for the thumbnails and one block of distances.
    """
    nearest, highest = (
        np.zeros(len(test_TSS), np.int64),
        np.full(len(test_TSS), -np.inf, np.float32),
    )
    for top in range(0, len(test_TSS), BLOCK):
        rows = slice(top, top + BLOCK)
        slopes_TD = _slopes(test_TSS[rows])
        for left in range(0, len(train_NSS), BLOCK):
            likeness_TN = slopes_TD @ _slopes(train_NSS[left : left + BLOCK]).T
            best = likeness_TN.argmax(1)
            likeness = likeness_TN[np.arange(len(best)), best]
            closer = likeness > highest[rows]
            nearest[rows][closer], highest[rows][closer] = left + best[closer], likeness[closer]
    return nearest, np.maximum(0, 1 - highest)


def _slopes(thumbnails_NSS: np.ndarray) -> np.ndarray:
    """Differences of neighbours, across and down, less their mean and scaled to length 1: dot
    products correlate.
    """
    pixels = thumbnails_NSS.astype(np.float32)
    across, down = (np.diff(pixels, axis=axis).reshape(len(pixels), -1) for axis in (2, 1))
    slopes_ND = np.concatenate([across, down], axis=1)
    slopes_ND -= slopes_ND.mean(1, keepdims=True)
    length = np.linalg.norm(slopes_ND, axis=1, keepdims=True)
    return slopes_ND / np.where(length > 0, length, 1)


def _same_questions(
    train: Sequence[Question], test: Sequence[Question]
) -> Iterator[dict[str, Any]]:
    first: dict[tuple[str, ...], Question] = {}
    for question in train:
        first.setdefault(_text_key(question), question)
    for question in test:
        if same := first.get(_text_key(question)):
            images = {"train_image": None, "test_image": None, "distance": None}
            yield {"kind": "same_question", "train": same.source, "test": question.source, **images}


def _text_key(question: Question) -> tuple[str, ...]:
    return plain_text(question.question), *sorted(plain_text(option) for option in question.options)


def _touched(test: Sequence[Question], pairs: Sequence[dict[str, Any]], kind: str) -> int:
    images = {pair["test_image"] for pair in pairs if pair["kind"] == kind}
    return sum(any(str(image) in images for image in question.images) for question in test)


def _answers_seen(train: Sequence[Question], test: Sequence[Question]) -> dict[str, float]:
    right = {_right_text(question) for question in train}
    seen: dict[str, list[bool]] = {}
    for question in test:
        seen.setdefault(question.modality, []).append(_right_text(question) in right)
    return {modality: sum(values) / len(values) for modality, values in seen.items()}


def _right_text(question: Question) -> str:
    return plain_text(question.options[right_index(question)])


def summary(result: dict[str, Any]) -> str:
    """What `leakage` found, for a terminal: counts, answers, the first 20 pairs; nothing
    unprintable but newlines.
    """
    kinds = {
        "same_path": "image in training, by path",
        "same_bytes": "image in training, same bytes",
        "near_duplicates": "near-duplicate of a training image",
        "same_question": "question and options in training",
    }
    lines = [f"{result['test']:,} test questions against {result['train']:,} training questions"]
    if missing := result["missing_images"]:
        files = "1 image file is" if missing == 1 else f"{missing:,} image files are"
        lines.append(f"{files} missing: only paths and text were compared")
    for key, label in kinds.items():
        count = result[key]
        share = (
            "not compared"
            if count is None
            else f"{count:>6,} {100 * count / result['test']:>6.1f} %"
        )
        lines.append(f"  {label:<38}{share}")
    for modality, share in result["answers_seen"].items():
        lines.append(
            f"  {f'right answer seen in training, {modality}':<38}{'':>6} {100 * share:>6.1f} %"
        )
    for pair in result["pairs"][:PRINTED]:
        near = "" if pair["kind"] != "near_duplicate" else f", distance {pair['distance']:.3f}"
        lines.append(
            f"{pair['kind'].replace('_', ' ')}{near}: {_side(pair, 'test')} - {_side(pair, 'train')}"
        )
    if result["pairs_total"] > PRINTED:
        lines.append(f"and {result['pairs_total'] - PRINTED:,} more")
    return "\n".join(printable(line) for line in lines)


def _side(pair: dict[str, Any], side: str) -> str:
    image = pair[f"{side}_image"]
    return f"{pair[side]} ({Path(image).name})" if image else pair[side]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="leakage", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("train", type=Path, help="question file of the training set")
    parser.add_argument("test", type=Path, help="question file of the test set")
    parser.add_argument(
        "--image_dir",
        type=Path,
        help="folder of both files' images; default: each file's own folder",
    )
    given = parser.parse_args()
    try:
        train, test = (
            read_questions(file, given.image_dir, check_images=False)
            for file in (given.train, given.test)
        )
        print(summary(leakage(train, test)))
    except InputError as error:
        print(f"leakage: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGPIPE, signal.SIG_DFL
    )  # who reads a pipe may leave early, as `head` does
    sys.exit(main())
