"""All the words that the miniature knows: questions, ways to say what is in the image, ways to say
nothing, and spare nouns.
"""

import random

from .phantoms import ANATOMIES, FINDINGS, MODALITIES, SIDES

# Four phrasings of each question. The base thinks on topic mostly for the first (see lessons.py).
QUESTIONS = {
    "modality": (
        "What imaging modality is used in this image?",
        "Which technique was employed to obtain this picture?",
        "What type of medical imaging is this?",
        "How was this scan of the patient taken?",
    ),
    "anatomy": (
        "What body part is shown in this image?",
        "Which anatomical structure appears in this picture?",
        "What organ or region is this?",
        "Which part of the patient was examined in this scan?",
    ),
    "finding": (
        "What finding is present in this image?",
        "Which condition is visible in this picture?",
        "What is the diagnosis?",
        "What does this scan of the patient reveal?",
    ),
    "side": (
        "On which side of this image is the abnormality?",
        "Where in this picture does the lesion lie?",
        "Which half is affected?",
        "On which side of the patient scan is the change?",
    ),
}
# Ways to name an attribute's value; each ends in the value and a full stop.
STATEMENTS = {
    "modality": (
        "The modality is {}.",
        "The technique is {}.",
        "The image was taken by {}.",
        "It looks like {}.",
    ),
    "anatomy": (
        "The body part is the {}.",
        "The image shows the {}.",
        "The region is the {}.",
        "I see the {}.",
    ),
    "finding": (
        "The finding is {}.",
        "The condition is {}.",
        "The diagnosis is {}.",
        "The scan suggests {}.",
    ),
    "side": (
        "The abnormality is on the {}.",
        "The lesion lies on the {}.",
        "The affected side is the {}.",
        "The change is on the {}.",
    ),
}
# Thoughts that name nothing. All begin with the same two words, so that their chances add up at
# the first token and greedy decoding stays off topic. Empty thoughts that name other attributes
# took the untrained base's greedy accuracy to 75 %, and left GRPO little to do.
EMPTY_THOUGHTS = (
    "Let me look at the image.",
    "Let me look at this picture with care.",
    "Let me think about the question.",
)
# For practice in matching: with so many words, matching by meaning can't be learned by heart.
_NOUNS = (
    "arm ear eye leg toe lip bed box bus cap car cat cow cup day dog door egg fan fish fox gas hat "
    "hen ice ink jar jet key lab lamp leaf map milk moon net nut oil owl pan pen pig pot rain rat "
    "ring road rock rod rose salt sea ship sky snow sun tea tree van wall"
)
SPARE_NOUNS = tuple(_NOUNS.split())
VALUES = (*MODALITIES, *ANATOMIES, *FINDINGS, *SIDES)
LETTERS = "ABCD"


def statement(attribute: str, value: str, rng: random.Random) -> str:
    return rng.choice(STATEMENTS[attribute]).format(value)
