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
import sys
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.program import run_program
from data.prompt import TASK, prompt_text
from data.question import Question

from .phantoms import ATTRIBUTES, Case
from .pool import draw_one
from .words import LETTERS, QUESTIONS

Splits = dict[str, tuple[tuple[str, int], ...]]  # split -> modalities and how many images of each

SEED = 2025
VERSION = 1  # of this code's output: another one makes `write_questions` write anew
SPLITS: Splits = {
    "train": (("MRI", 600),),
    "validation": (("MRI", 150),),
    "test": (("MRI", 300), ("CT", 300), ("radiograph", 300)),
}
# The words of the published files, odd hyphen included: reading these is what readers must do.
SUBSETS = {
    "MRI": "MR (Mag-netic Resonance Imaging)",
    "CT": "CT(Computed Tomography)",
    "radiograph": "X-Ray",
}
OPTION_WEIGHTS = (1, 2, 3)  # how often 2, 3 and 4 options: the more, the less is won by guessing
TYPES = {
    "modality": "Modality Recognition",
    "anatomy": "Anatomy Identification",
    "finding": "Disease Diagnosis",
    "side": "Other Biological Attributes",
}


def ask(case: Case, rng: random.Random, attribute: str | None = None) -> Question:
    """A question with 2 to 4 options (or as many as the attribute has values), as far as a prompt
    needs it. It asks for `attribute`, by default for any one, which is then its `question_type`.

    Wrong options and the right one's place are uniform: the text gives nothing away.
    """
    attribute = attribute or rng.choice(list(case.known))
    answer = case.known[attribute]
    wrong = [value for value in ATTRIBUTES[attribute] if value != answer]
    weights = OPTION_WEIGHTS[: len(wrong)]
    count = rng.choices(range(len(weights)), weights)[0] + 2
    options = rng.sample(wrong, count - 1)
    place = rng.randrange(count)
    options.insert(place, answer)
    text = rng.choice(QUESTIONS[attribute])
    return Question((), text, tuple(options), LETTERS[place], "", attribute, "")


def right_option(question: Question) -> str:
    return question.options[LETTERS.index(question.answer)]


def write_questions(folder: Path, splits: Splits = SPLITS, seed: int = SEED) -> None:
    """Write all splits and their images below `folder`. If this version is there already, do
    nothing.
    """
    stamp = folder / "stamp.json"
    contents = json.dumps({"version": VERSION, "seed": seed, "splits": splits}) + "\n"
    if stamp.is_file() and stamp.read_text() == contents:
        print(f"{folder} is up to date")
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, counts in splits.items():
        rows: list[dict[str, object]] = []
        for modality, count in counts:
            for _ in tqdm(range(count), desc=f"drawing {split}, {modality}"):
                rows.append(_write_row(folder, split, len(rows), modality, seed))
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1) + "\n")
    stamp.write_text(contents)  # last, so that what was interrupted is written again


def _write_row(folder: Path, split: str, index: int, modality: str, seed: int) -> dict[str, object]:
    image, case = draw_one(seed, split, index, modality)
    path = f"images/{split}{index:04d}.png"
    Image.fromarray(image).convert("RGB").save(folder / path)
    question = ask(case, random.Random(f"{seed}/{split}/{index}"))
    return {
        "image": [path],
        "problem": prompt_text(question).removesuffix(f"\n{TASK}"),
        "solution": question.answer,
        "question": question.question,
        "options": question.options,
        "answer": right_option(question),
        "dataset": "miniature phantoms",
        "subset": SUBSETS[modality],
        "modality": SUBSETS[modality],
        "question_type": TYPES[question.question_type],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the miniature's images and questions.")
    parser.add_argument("--out", type=Path, required=True, help="for instance build/miniature")
    return run_program("questions", partial(write_questions, parser.parse_args().out))


if __name__ == "__main__":
    sys.exit(main())
