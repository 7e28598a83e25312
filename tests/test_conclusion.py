"""The options that a reasoning names, denies and concludes."""

import time

import pytest

from evaluation.audits.conclusion import conclusion, mask_options, named_options
from rewards import LETTERS

MODALITY = ["MRI", "CT", "CT angiography", "X-ray"]
FINDING = ["mass", "no mass", "Pleural effusion.", "Rib fracture"]
STATE = ["Normal", "Abnormal"]


@pytest.mark.parametrize(
    ("text", "options", "letters"),
    [
        ("The body part is the knee.", ["Knee", "Brain"], "A"),
        ("Both KIDNEYS are seen.", ["the kidney", "liver"], "A"),
        ("An abnormality", ["bone abnormalities", "Abnormalities"], "B"),
        ("one renal cyst", ["Renal cysts", "Kidney"], "A"),
        ("An x ray, or X_Ray.", MODALITY, "D"),
        ("a CT angiography", MODALITY, "C"),
        ("CT angiography beats CT", MODALITY, "CB"),
        ("first CT, then MRI, then CT", MODALITY, "AB"),
        ("It is abnormal.", STATE, "B"),
        ("There is no mass.", FINDING, "B"),
        ("massive, amass, mass_", FINDING, "A"),
        ("a computed tomography", ["Computed Tomography (CT)", "Prostate (for males)"], "A"),
        ("a CT, for males", ["Computed Tomography (CT)", "Prostate (for males)"], "A"),
        ("the CT", ["CT", "Computed Tomography (CT)"], "A"),
        ("It looks normal.", ["No, It's normal.", "Yes, it shows a significant abnormality."], "A"),
        (
            "There is no significant abnormality",
            ["No, It's normal.", "Yes, it shows a significant abnormality."],
            "B",
        ),
        ("There is no shadow", ["Yes", "No"], ""),
        ("No, there is a shadow", ["Yes", "No"], "B"),
        (
            "COVID is seen",
            ["Asthma. Lungs will be affected.", "COVID. Lungs will be affected."],
            "B",
        ),
        ("A mass in a lung", ["Heart", "Skin"], ""),
        ("A mass; option B, (C) and the answer is D", ["Heart", "Skin", "Liver", "Bone"], "BCD"),
        ("Option D or choice E", ["Heart", "Skin"], ""),
        ("A b a B 2", ["a", "B", "+/-", ""], ""),
        ("a C++ (really) [x] .*", ["C++ (really", "[x]", ".*", "\\"], "A"),
        ("twins", ["Twin", "twin"], ""),
        ("", MODALITY, ""),
    ],
)
def test_an_option_is_named_only_by_its_words_or_its_announced_letter(text, options, letters):
    assert named_options(text, options) == set(letters)


@pytest.mark.parametrize(
    ("think", "options", "letter"),
    [
        ("The scan is an MRI.", MODALITY, "A"),
        ("It may be a CT. It is an MRI.", MODALITY, "A"),
        ("It is an MRI, not a CT.", MODALITY, "A"),
        ("It is not a CT but an MRI.", MODALITY, "A"),
        ("It isn't a CT. It is not only an X-ray", MODALITY, "D"),
        ("It is an MRI rather than a CT or an X-ray", MODALITY, "A"),
        ("It is an MRI. A CT is ruled out, and X-ray cannot be.", MODALITY, "A"),
        ("It is an MRI. There is no sign of a rib fracture.", ["Rib fracture", "MRI"], "B"),
        ("It is used to diagnose a rib fracture.", FINDING, None),
        ("No signs of rib fracture, mass, or pleural effusion.", FINDING, None),
        ("No rib fracture is seen, which suggests a pleural effusion.", FINDING, "C"),
        ("The fluid and the lack of air suggest a pleural effusion.", FINDING, "C"),
        ("There is nothing that would not suggest a pleural effusion.", FINDING, None),
        ("There is no mass.", FINDING, "B"),
        ("A rib fracture or a pleural effusion.", FINDING, None),
        ("Is it a rib fracture? A pleural effusion.", FINDING, "C"),
        ("Therefore it is an MRI. A CT looks different.", MODALITY, "A"),
        ("With an X-ray and a CT at hand, the answer is MRI.", MODALITY, "A"),
        ("The answer is B. An MRI looks different.", MODALITY, "B"),
        ("Therefore it is a CT. So the answer is A.", MODALITY, "A"),
        ("Option A is incorrect. Option B fits.", MODALITY, "B"),
        ("Let me look at the image.", MODALITY, None),
    ],
)
def test_the_conclusion_is_the_option_that_is_concluded_or_asserted_last(think, options, letter):
    assert conclusion(think, options) == letter


def test_masking_removes_every_option_and_nothing_else():
    assert (
        mask_options("The CT, or B) MRI, shows a mass.", MODALITY, "_")
        == "The _, or _ _, shows a mass."
    )


@pytest.mark.parametrize(
    "unit",
    [
        "a a a ",
        "mass. ",
        "no mass, ",
        "therefore mass ",
        " ",
        "mass ",
        "(",
        "option ",
        "x",
        "x.",
        "\n",
    ],
)
def test_a_megabyte_of_hostile_text_takes_linear_time(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    conclusion(text, FINDING)
    mask_options(text[:100_000], FINDING)
    assert time.process_time() - started < 5


def test_hostile_options_are_texts_not_patterns():
    options = ["(", "a" * 2000 + "!", ".*", "[", "\\", "(?P<x>", "x{9999}", "|", "\x00", "ß" * 50][
        : len(LETTERS)
    ]
    assert named_options("everything ( [ | \\ and x 9999", options) == {"G"}
    assert conclusion("a" * 2000, options) == "B"
