"""Question files: every dialect, and every way to get one wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest

from common.errors import InputError
from data import canonical_modality, read_questions

RADIOLOGY = Path(__file__).parents[2] / "shared" / "radiology"


def medvlm_row(**changes):
    row = {
        "image": ["scan.png"],
        "question": "What is seen?",
        "options": ["Cyst", "Mass.", "Nothing"],
        "answer": "Nothing",
        "subset": "MR (Mag-netic Resonance Imaging)",
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def omni_row(**changes):
    row = {
        "question_id": "q1",
        "image_path": "scan.png",
        "question": "Which organ?",
        "option_A": "Lung",
        "option_B": "Liver",
        "gt_answer": "Liver",
        "modality_type": "CT(Computed Tomography)",
        "question_type": "Anatomy Identification",
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def med_r1_row(problem, solution="<answer> B </answer>", **changes):
    return {"image": "scan.png", "problem": problem, "solution": solution} | changes


@pytest.fixture
def write(tmp_path):
    def _write(*rows, name="test.json", text=None):
        (tmp_path / "scan.png").touch()
        file = tmp_path / name
        file.write_text(json.dumps(rows) if text is None else text, encoding="utf-8")
        return file

    return _write


def one_line_error(file, *parts, **options):
    with pytest.raises(InputError) as caught:
        read_questions(file, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(file), *parts):
        assert part in message
    return message


def test_medvlm_row_keeps_every_field(write, tmp_path):
    [question] = read_questions(write(medvlm_row(question_type="Disease Diagnosis")))
    assert question.images == ((tmp_path / "scan.png").resolve(),)
    assert question.question == "What is seen?"
    assert question.options == ("Cyst", "Mass.", "Nothing")
    assert (question.answer, question.modality, question.question_type) == (
        "C",
        "MRI",
        "Disease Diagnosis",
    )
    assert question.source == "test.json row 1"


def test_json_lines_are_numbered_as_in_an_editor(write):
    text = json.dumps(medvlm_row()) + "\n\n" + json.dumps(omni_row()) + "\n"
    questions = read_questions(write(name="anything.txt", text=text))
    assert [question.source for question in questions] == [
        "anything.txt line 1",
        "anything.txt line 3",
    ]
    assert [question.answer for question in questions] == ["C", "B"]


def test_byte_order_mark_is_skipped(write):
    assert len(read_questions(write(text="\ufeff" + json.dumps([medvlm_row()])))) == 1


@pytest.mark.parametrize(("letters", "answer"), [("AB", "B"), ("ABC", "C"), ("ABCD", "D")])
def test_omnimedvqa_takes_two_to_four_options(write, letters, answer):
    options = {f"option_{letter}": f"organ {letter}" for letter in letters}
    row = omni_row(**options, gt_answer=f"organ {answer}")
    [question] = read_questions(write(row))
    assert (len(question.options), question.answer, question.modality) == (
        len(letters),
        answer,
        "CT",
    )
    assert question.question_type == "Anatomy Identification"


def test_omnimedvqa_option_that_is_null_is_ignored(write):
    [question] = read_questions(write(omni_row(option_C=None, option_D="")))
    assert question.options == ("Lung", "Liver")


def test_med_r1_options_may_hold_commas_parentheses_and_full_stops(write):
    problem = (
        "If (as in A) unsure, what is seen? "
        "A)Good (A), clear., B)Type (B), e.g. C) small, D) none, C)IQA (D)."
    )
    [question] = read_questions(write(med_r1_row(problem), name="X-Ray_test.json"))
    assert question.question == "If (as in A) unsure, what is seen?"
    assert question.options == ("Good (A), clear.", "Type (B), e.g. C) small, D) none", "IQA (D).")
    assert (question.answer, question.modality) == ("B", "X-ray")


def test_med_r1_options_may_be_on_separate_lines(write):
    [question] = read_questions(write(med_r1_row("What?\nA) Cyst\nB) Mass, large", "B")))
    assert (question.question, question.options) == ("What?", ("Cyst", "Mass, large"))


def test_med_r1_takes_all_10_letters(write):
    letters = [chr(65 + index) for index in range(10)]
    problem = "Which? " + ", ".join(f"{letter}){letter.lower()}" for letter in letters)
    [question] = read_questions(write(med_r1_row(problem, "J")))
    assert question.options == tuple("abcdefghij")


def test_med_r1_modality_comes_from_the_row_then_the_file_and_is_never_guessed(write):
    row = med_r1_row("What? A)x, B)y")
    assert (
        read_questions(write(row, name="OCT (Optical Coherence Tomography_train.json"))[0].modality
        == "OCT"
    )
    assert (
        read_questions(write(row | {"modality": "PET"}, name="X-Ray_test.json"))[0].modality
        == "PET"
    )
    assert read_questions(write(row, name="Disease Diagnosis_test.json"))[0].modality == "unknown"


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("MR (Mag-netic Resonance Imaging)", "MRI"),
        ("MRI", "MRI"),
        ("CT(Computed Tomography)", "CT"),
        ("X-Ray", "X-ray"),
        ("ultrasound", "Ultrasound"),
        ("Fundus Photography", "Fundus"),
        ("Dermoscopy", "Dermoscopy"),
        ("Microscopy Images", "Microscopy"),
        ("OCT (Optical Coherence Tomography", "OCT"),
        (" Thermography ", "Thermography"),
        ("CT-MRI fusion", "CT-MRI fusion"),
        ("", "unknown"),
    ],
)
def test_known_modalities_get_their_canonical_name_and_others_stay(name, modality):
    assert canonical_modality(name) == modality


def test_answer_may_lack_the_options_full_stop_but_the_exact_option_wins(write):
    assert read_questions(write(medvlm_row(answer="Mass")))[0].answer == "B"
    assert (
        read_questions(write(medvlm_row(options=["Mass.", "Mass"], answer="Mass")))[0].answer == "B"
    )


def test_only_the_solution_decides_between_duplicate_options(write):
    twice = medvlm_row(options=["Cyst", "Mass", "Cyst"], answer="Cyst")
    one_line_error(write(twice), "row 1", "`answer`", "A, C", "`solution`")
    assert read_questions(write(twice | {"solution": "C"}))[0].answer == "C"
    assert read_questions(write(twice | {"answer": "Mass"}))[0].answer == "B"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (medvlm_row(answer="Tumour"), ["`answer`", "'Tumour'", "Cyst"]),
        (medvlm_row(solution="A"), ["`solution`", "is A, but `answer` is C"]),
        (medvlm_row(solution="D"), ["`solution`", "A to C"]),
        (medvlm_row(options=["Nothing"]), ["`options`", "1 options"]),
        (medvlm_row(options=["Nothing"] * 11), ["`options`", "11 options"]),
        (medvlm_row(options="Cyst, Mass"), ["`options`", "a text", "list"]),
        (medvlm_row(options=["Cyst", 3]), ["`options`", "a number"]),
        (medvlm_row(options=["Cyst", " "]), ["`options`", "no text"]),
        (medvlm_row(options=...), ["`options`", "missing", "question"]),
        (medvlm_row(question=None), ["`question`", "null"]),
        (medvlm_row(question="\ud800"), ["`question`", "surrogate"]),
        (medvlm_row(subset=7), ["`subset`", "a number"]),
        (medvlm_row(image=[]), ["`image`", "a list", "at least one"]),
        (medvlm_row(image=5), ["`image`", "a number"]),
        (medvlm_row(image="gone.png"), ["`image`", "gone.png"]),
        (omni_row(gt_answer="Spleen"), ["`gt_answer`", "'Spleen'"]),
        (omni_row(gt_answer=...), ["`gt_answer`", "missing"]),
        (omni_row(option_B=..., option_C="Liver"), ["`option_B`", "option_C"]),
        (omni_row(option_A=...), ["`option_A`", "option_B"]),
        (omni_row(image_path={}), ["`image_path`", "an object"]),
        (med_r1_row("What? Lung, B)Liver"), ["`problem`", "A)"]),
        (med_r1_row("A)Lung, B)Liver"), ["`problem`", "question"]),
        (med_r1_row("What? A), B)Liver"), ["`problem`", "empty option A"]),
        (med_r1_row("What? A)Lung, B)Liver", "<answer> C </answer>"), ["`solution`", "A to B"]),
        (med_r1_row("What? A)Lung, B)Liver", "Liver"), ["`solution`", "A to B"]),
        (["not", "an", "object"], ["a list", "object"]),
        (None, ["null", "object"]),
    ],
)
def test_wrong_row_is_one_line_that_names_file_row_and_field(write, row, parts):
    one_line_error(write(medvlm_row(), row), "row 2", *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        (" \n\t\n", "empty"),
        ("[]", "empty"),
        ("[{]", "not readable as JSON"),
        ("question,answer\n1,2", "line 1: not JSON"),
        ('{"a": 1}\n{oops', "line 1"),
        (json.dumps(medvlm_row()) + '\n{"image": ["scan.p', "line 2: not JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[" + "9" * 5000 + "]", "not readable as JSON"),
        ('{"questions": [', "not JSON"),
        ("3", "a number"),
    ],
)
def test_file_that_is_not_a_list_of_questions_is_one_line(write, text, part):
    one_line_error(write(text=text), part)


def test_file_that_is_missing_a_folder_or_not_utf8_is_one_line(tmp_path):
    one_line_error(tmp_path / "none.json", "No such file")
    one_line_error(tmp_path, "directory")
    latin = tmp_path / "latin.json"
    latin.write_bytes('[{"question": "fièvre"}]'.encode("latin-1"))
    one_line_error(latin, "UTF-8")


def test_missing_image_names_row_and_path_unless_images_are_not_checked(write, tmp_path):
    file = write(medvlm_row(), medvlm_row(image=["scan.png", "gone.png"]))
    one_line_error(file, "row 2", "`image`", str(tmp_path / "gone.png"))
    assert len(read_questions(file, check_images=False)[1].images) == 2


def test_image_folder_may_be_elsewhere(write, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "only_here.png").touch()
    [question] = read_questions(
        write(medvlm_row(image=["only_here.png"])), image_dir=tmp_path / "images"
    )
    assert question.images == ((tmp_path / "images" / "only_here.png").resolve(),)


@pytest.mark.parametrize("check_images", [True, False])
@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.png", "../images/in.png", "link.png", "linked/secret.png"]
)
def test_path_that_leaves_the_image_folder_is_refused(write, tmp_path, name, check_images):
    (tmp_path / "secret.png").touch()
    images = tmp_path / "images"
    images.mkdir()
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "linked").symlink_to(tmp_path)
    file = write(medvlm_row(image=[name]))
    one_line_error(
        file,
        "row 1",
        "`image`",
        "leaves the image folder",
        image_dir=images,
        check_images=check_images,
    )


@pytest.mark.parametrize("name", ["nul\0.png", "long" * 1000 + ".png", "loop.png"])
def test_impossible_path_is_no_traceback(write, tmp_path, name):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    one_line_error(write(medvlm_row(image=[name])), "row 1", "`image`")


@pytest.mark.parametrize(
    ("name", "count", "modalities"),
    [
        ("medvlm_r1_test_questions.json", 900, {"MRI": 300, "CT": 300, "X-ray": 300}),
        ("omnimedvqa_mri_questions.json", 600, {"MRI": 600}),
        ("train_mri.jsonl", 553, {"MRI": 553}),
    ],
)
def test_all_published_questions_are_read(name, count, modalities):
    if not RADIOLOGY.is_dir():
        pytest.skip(f"needs {RADIOLOGY}, which is not shipped")
    questions = read_questions(RADIOLOGY / name, check_images=name.endswith("jsonl"))
    assert (len(questions), Counter(question.modality for question in questions)) == (
        count,
        modalities,
    )
