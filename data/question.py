"""The `Question` type, and the canonical names of imaging modalities."""

import re
from dataclasses import dataclass
from pathlib import Path

# Names used by OmniMedVQA (whose files have "Mag-netic", "ultrasound" and the unclosed "OCT (..."),
# by the data sets derived from it, and in everyday language.
_NAMES = {
    "MRI": (
        "MRI",
        "MR",
        "MR (Magnetic Resonance Imaging)",
        "MRI (Magnetic Resonance Imaging)",
        "Magnetic Resonance Imaging",
        "Magnetic Resonance Imaging (MRI)",
    ),
    "CT": (
        "CT",
        "CT scan",
        "CT (Computed Tomography)",
        "Computed Tomography",
        "Computed Tomography (CT)",
    ),
    "X-ray": (
        "X-ray",
        "X-ray imaging",
        "Chest X-ray",
        "Radiograph",
        "Radiography",
        "Digital Radiography",
    ),
    "Ultrasound": ("Ultrasound", "Ultrasonography", "US (Ultrasound)"),
    "Fundus": ("Fundus", "Fundus Photography"),
    "Dermoscopy": ("Dermoscopy",),
    "Microscopy": ("Microscopy", "Microscopy Image", "Microscopy Images"),
    "OCT": (
        "OCT",
        "OCT (Optical Coherence Tomography)",
        "Optical Coherence Tomography",
        "Optical Coherence Tomography (OCT)",
    ),
}
MODALITIES = tuple(_NAMES)


def _plain(name: str) -> str:
    """The name without case, spaces and punctuation, for comparison."""
    return re.sub(r"[\W_]+", "", name).casefold()


_CANONICAL = {_plain(name): modality for modality, names in _NAMES.items() for name in names}


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question. It holds only text, so it is cheap to keep and to pickle.

    Attributes:
        images: resolved paths, in the order of the prompt.
        question: the text of the question, without its options.
        options: 2 to 10 texts; the first is A.
        answer: the letter of the correct option.
        modality: canonical name ("MRI", "CT", "X-ray", ...).
        question_type: as in the file ("Disease Diagnosis", ...), or "".
        source: where it was read, e.g. "test.json row 12"; for messages and logs.
    """

    images: tuple[Path, ...]
    question: str
    options: tuple[str, ...]
    answer: str
    modality: str
    question_type: str
    source: str


def canonical_modality(name: str) -> str:
    """The canonical name of a modality: "MR (Mag-netic Resonance Imaging)" -> "MRI".

    An unknown name is only stripped of surrounding white space; an empty one becomes "unknown".
    """
    return _CANONICAL.get(_plain(name), name.strip() or "unknown")
