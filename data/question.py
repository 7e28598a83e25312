"""What a question is, and what its imaging modality is called."""

import re
from dataclasses import dataclass
from pathlib import Path

# Names of OmniMedVQA, whose files say "Mag-netic" and "ultrasound" and leave the parenthesis of
# "OCT (..." open, of the data sets derived from it, and of everyday use.
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
    """The name as it is compared: without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name).casefold()


_CANONICAL = {_plain(name): modality for modality, names in _NAMES.items() for name in names}


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question: text only, cheap to keep and to pickle.

    Attributes:
        images: resolved paths, in the order in which the prompt shows them.
        question: the question itself, without its options.
        options: 2 to 10 texts; the first is A.
        answer: the right option's letter.
        modality: canonical name ("MRI", "CT", "X-ray", ...).
        question_type: the file's own word for it ("Disease Diagnosis", ...), or "".
        source: where it was read, "test.json row 12"; for messages and logs.
    """

    images: tuple[Path, ...]
    question: str
    options: tuple[str, ...]
    answer: str
    modality: str
    question_type: str
    source: str


def canonical_modality(name: str) -> str:
    """One name for each modality: "MR (Mag-netic Resonance Imaging)" -> "MRI".

    A name that is not known is kept as it is (surrounding white space aside); an empty one becomes
    "unknown".
    """
    return _CANONICAL.get(_plain(name), name.strip() or "unknown")
