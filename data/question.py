"""What a question is, and what its imaging modality is called."""

import re
from dataclasses import dataclass
from pathlib import Path

# Names of OmniMedVQA (whose files say "Mag-netic", "ultrasound" and leave the parenthesis of "OCT
# (..." open), of the data sets derived from it, and of everyday use; compared without case, spaces
# and punctuation.
_NAMES = {
    "MRI": ("MR (Magnetic Resonance Imaging)", "MRI (Magnetic Resonance Imaging)", "Magnetic Resonance Imaging",
            "Magnetic Resonance Imaging (MRI)", "MRI", "MR"),
    "CT": ("CT (Computed Tomography)", "Computed Tomography", "Computed Tomography (CT)", "CT", "CT scan"),
    "X-ray": ("X-ray", "X-ray imaging", "Chest X-ray", "Radiograph", "Radiography", "Digital Radiography"),
    "Ultrasound": ("Ultrasound", "Ultrasonography", "US (Ultrasound)"),
    "Fundus": ("Fundus Photography", "Fundus"),
    "Dermoscopy": ("Dermoscopy",),
    "Microscopy": ("Microscopy Images", "Microscopy Image", "Microscopy"),
    "OCT": ("OCT (Optical Coherence Tomography)", "Optical Coherence Tomography",
            "Optical Coherence Tomography (OCT)", "OCT"),
}  # fmt: skip
MODALITIES = tuple(_NAMES)
UNKNOWN_MODALITY = "unknown"


def _plain(name: str) -> str:
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
    return _CANONICAL.get(_plain(name), name.strip() or UNKNOWN_MODALITY)


def option_letter(index: int) -> str:
    """0 -> "A", 25 -> "Z"."""
    return chr(ord("A") + index)
