"""The miniature's questions, written to disk as PNG and JSON in the schema of the MedVLM-R1 test
set.

    python -m miniature.questions --out build/miniature

writes `train.json` (600 MRI questions), `validation.json` (150 MRI) and `test.json` (300 each of
MRI, CT and X-ray), one question an image. The images of the three files, and those from which the
base is made, come from disjoint streams of random numbers.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .phantoms import ATTRIBUTES, Case
from .pool import draw_one
from .words import LETTERS, QUESTIONS

VERSION, SEED = 1, 2025
SPLITS = {
    "train": (("MRI", 600),),
    "validation": (("MRI", 150),),
    "test": (("MRI", 300), ("CT", 300), ("radiograph", 300)),
}
SUBSETS = {
    "MRI": "MR (Mag-netic Resonance Imaging)",
    "CT": "CT(Computed Tomography)",
    "radiograph": "X-Ray",
}
OPTION_COUNTS = {
    2: 1,
    3: 2,
    4: 3,
}  # and how often each; attributes of fewer values have fewer options
TYPES = {
    "modality": "Modality Recognition",
    "anatomy": "Anatomy Identification",
    "finding": "Disease Diagnosis",
    "side": "Other Biological Attributes",
}


@dataclass(frozen=True)
class Asked:
    """A multiple-choice question about a case; `phrasing` counts into QUESTIONS[attribute]."""

    attribute: str
    phrasing: int
    options: tuple[str, ...]
    letter: str

    @property
    def question(self) -> str:
        return QUESTIONS[self.attribute][self.phrasing]

    @property
    def answer(self) -> str:
        return self.options[LETTERS.index(self.letter)]


def ask(case: Case, rng: random.Random) -> Asked:
    """A question with 2 to 4 options; wrong options and the right one's place are uniform: text
    tells nothing.
    """
    attribute = rng.choice([name for name in ATTRIBUTES if case.value(name) is not None])
    values, right = ATTRIBUTES[attribute], case.value(attribute)
    counts = [count for count in OPTION_COUNTS if count <= len(values)]
    count = rng.choices(counts, [OPTION_COUNTS[count] for count in counts])[0]
    options = rng.sample([value for value in values if value != right], count - 1)
    place = rng.randrange(count)
    options.insert(place, right)
    return Asked(
        attribute, rng.randrange(len(QUESTIONS[attribute])), tuple(options), LETTERS[place]
    )


def write_questions(
    folder: Path, splits: dict[str, tuple[tuple[str, int], ...]] = SPLITS, seed: int = SEED
) -> None:
    """Write all splits and their images below `folder`; nothing is done if that same version
    already stands there.
    """
    stamp, wanted = folder / "stamp.json", {"version": VERSION, "seed": seed, "splits": splits}
    wanted = json.loads(json.dumps(wanted))
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        print(f"{folder} is up to date")
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    total = sum(count for parts in splits.values() for _, count in parts)
    with tqdm(total=total, desc="drawing phantoms", unit="image") as bar:
        for split, parts in splits.items():
            rows = []
            for modality, count in parts:
                for _ in range(count):
                    rows.append(_write_row(folder, split, len(rows), modality, seed))
                    bar.update()
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1) + "\n")
    stamp.write_text(json.dumps(wanted) + "\n")


def _write_row(folder: Path, split: str, index: int, modality: str, seed: int) -> dict[str, object]:
    image, case = draw_one(seed, split, index, modality)
    path = f"images/{split}{index:04d}.png"
    Image.fromarray(image).convert("RGB").save(folder / path)
    asked = ask(case, random.Random(f"{seed}/{split}/{index}"))
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, asked.options)]
    return {
        "image": [path],
        "problem": "\n".join([asked.question, *lines]),
        "solution": asked.letter,
        "question": asked.question,
        "options": list(asked.options),
        "answer": asked.answer,
        "dataset": "miniature phantoms",
        "subset": SUBSETS[modality],
        "modality": SUBSETS[modality],
        "question_type": TYPES[asked.attribute],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the miniature's images and write its questions."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write to, for instance build/miniature"
    )
    write_questions(parser.parse_args().out)


if __name__ == "__main__":
    main()
