"""Seeded fuzzing of every reader: any input gives a result or an InputError of one line."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import flat_config, tiny_config

from common.config import config_toml, load_config
from common.errors import LONGEST_MESSAGE, InputError
from data import load_image, read_questions
from data.images import image_size
from evaluation.audits.completions import read_completions
from evaluation.records import read_rows
from evaluation.report.curves import read_metrics
from model import Qwen2VLConfig, read_config
from model.config import parse_config
from rewards import LETTERS, RULES, read_letter, score

fuzzed = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


def result_or_line(call: Any, *arguments: Any) -> Any:
    """The result of the call, or None if it raises an InputError, the only error allowed."""
    try:
        return call(*arguments)
    except InputError as error:
        message = str(error)
        assert message.isprintable() and 0 < len(message) <= LONGEST_MESSAGE
        return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "scan.png").touch()
    return folder


TEXT = st.text(max_size=30) | st.sampled_from(
    ["Mass", "B", "<answer> B </answer>", "scan.png", "../x", "\0", "Q? A)x, B)y"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
LAYOUTS = (
    {
        "image": ["scan.png"],
        "question": "What?",
        "options": ["Cyst", "Mass"],
        "answer": "Mass",
        "solution": "B",
        "modality": "MRI",
        "question_type": "Disease",
    },
    {
        "image_path": "scan.png",
        "question": "What?",
        "option_A": "Cyst",
        "option_B": "Mass",
        "gt_answer": "Mass",
        "modality_type": "CT",
        "question_type": "Disease",
    },
    {
        "image": "scan.png",
        "problem": "What? A)Cyst, B)Mass",
        "solution": "<answer> B </answer>",
        "modality": "CT",
    },
    {
        "id": "1",
        "model": "m",
        "question": "What?",
        "options": ["Cyst", "Mass"],
        "ground_truth": "B",
        "completion": "B",
    },
    {
        "model": "m",
        "probe": "p",
        "place": 0,
        "contract": "c",
        "digest": "d",
        "letter": "A",
        "modality": "MRI",
    },
)
FIELDS = sorted({name for layout in LAYOUTS for name in layout})


@st.composite
def changed_rows(draw) -> list[Any]:
    """Rows of the dialects, with some fields removed, exchanged or filled with anything."""
    rows = []
    for layout in draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3)):
        changes = draw(
            st.dictionaries(st.sampled_from(FIELDS), JSON | TEXT | st.just(...), max_size=2)
        )
        rows.append({name: value for name, value in (layout | changes).items() if value is not ...})
    return rows


@st.composite
def cut_and_changed(draw, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with some exchanged, removed or inserted, or with the end cut off."""
    content = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        content[at : at + draw(st.sampled_from([0, 1, 1, 1, 4, 40]))] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


@st.composite
def question_files(draw) -> bytes:
    rows = draw(changed_rows())
    text = json.dumps(rows) if draw(st.booleans()) else "\n".join(map(json.dumps, rows))
    return draw(cut_and_changed(st.just(text.encode()))) if draw(st.booleans()) else text.encode()


def read_all(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for question in result_or_line(read_questions, file) or ():
        assert (
            question.question.strip()
            and 2 <= len(question.options) <= len(LETTERS)
            and question.answer in LETTERS
        )
        assert all(path.is_relative_to(file.parent) for path in question.images)
        json.dumps([question.question, *question.options]).encode()
    for read in (read_completions, read_rows, read_metrics):
        result_or_line(read, file)


@fuzzed
@given(st.binary(max_size=200))
def test_any_bytes_are_questions_or_one_line(scratch, content):
    read_all(scratch / "test.json", content)


@fuzzed
@given(question_files())
def test_a_damaged_question_file_is_questions_or_one_line(scratch, content):
    read_all(scratch / "test.json", content)


@fuzzed
@given(JSON)
def test_any_json_is_questions_or_one_line(scratch, value):
    read_all(scratch / "test.json", json.dumps(value).encode() + b"\n")


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).convert(mode).save(file, format=kind, exif=exif, **options)
    return file.getvalue()


IMAGES = tuple(
    encoded(kind, *mode)
    for kind, *mode in (
        ("PNG",),
        ("PNG", "P"),
        ("PNG", "LA"),
        ("PNG", "1"),
        ("PNG", "I;16"),
        ("JPEG",),
        ("JPEG", "CMYK"),
        ("MPO",),
        ("TIFF",),
        ("TIFF", "LAB"),
        ("TIFF", "F"),
        ("GIF",),
        ("BMP",),
        ("BMP", "P"),
        ("WEBP",),
        ("WEBP", "RGBA"),
        ("PPM",),
        ("JPEG2000",),
    )
)


@settings(fuzzed, max_examples=600)
@given(cut_and_changed(st.sampled_from(IMAGES)))
def test_a_damaged_image_is_an_image_or_one_line(scratch, content):
    file = scratch / "image"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd files that it can read
        image, size = result_or_line(load_image, file), result_or_line(image_size, file)
    assert image is None or image.mode == "RGB" and sorted(image.size) == sorted(size)


CONFIG = flat_config(tiny_config())
VALUES = (
    JSON
    | st.integers(-2, 10**7)
    | st.sampled_from(["mrope", "qwen2_vl", [2, 3, 3], 10**30, 1e-300])
)


@fuzzed
@given(
    st.dictionaries(st.sampled_from(sorted(CONFIG)), VALUES, max_size=3),
    st.dictionaries(st.sampled_from(sorted(CONFIG["vision_config"])), VALUES, max_size=2),
)
@example({"rope_scaling": {"mrope_section": "abc"}}, {})
def test_a_changed_model_config_is_a_config_or_one_line(changes, vision):
    raw = json.loads(
        json.dumps({**CONFIG, "vision_config": CONFIG["vision_config"] | vision} | changes)
    )
    config = result_or_line(parse_config, raw)
    assert (
        config is None
        or isinstance(config, Qwen2VLConfig)
        and config.head_dim == 2 * sum(config.mrope_section)
    )


@fuzzed
@given(cut_and_changed(st.just(json.dumps(CONFIG).encode())))
def test_a_damaged_model_config_is_a_config_or_one_line(scratch, content):
    (scratch / "config.json").write_bytes(content)
    result_or_line(read_config, scratch)


NEEDED = 'model = "m"\ntrain_questions = "q"\nrun_dir = "r"\n'
TOML_VALUES = st.sampled_from(
    [
        "1",
        "-1",
        "0.5",
        "nan",
        "inf",
        "true",
        '"x"',
        '["a"]',
        "[[1]]",
        "{a = 1}",
        "0x" + "f" * 5000,
        "1" + "0" * 400,
        '"\\u0000"',
        "1979-05-27",
        '"\\u007f"',
        '"cuda:9"',
        "''",
    ]
)
TOML_KEYS = st.sampled_from(
    [
        "steps",
        "beta",
        "seed",
        "device",
        "image_dir",
        "test_questions",
        "model",
        "freeze_vision",
        "x",
    ]
)


@fuzzed
@given(
    st.dictionaries(TOML_KEYS, TOML_VALUES, max_size=3).map(
        lambda d: "".join(f"{k} = {v}\n" for k, v in d.items())
    ),
    st.binary(max_size=20) | st.just(b""),
)
@example("beta = 1" + "0" * 400, b"")
@example("a = " + "[" * 5000, b"")
@example("test_questions = 0x" + "f" * 5000, b"")
@example("steps = [0x" + "f" * 5000 + "]", b"")
@example('image_dir = "\\u007f"\n', b"")
def test_any_toml_is_a_config_or_one_line(scratch, text, tail):
    file = scratch / "config.toml"
    file.write_bytes((NEEDED + text).encode() + tail)
    config = result_or_line(load_config, file)
    if config is not None:
        file.write_text(config_toml(config), encoding="utf-8")
        assert load_config(file) == config


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "B",
    "A)",
    "(b)",
    "**C**",
    "not ",
    "option ",
    "answer is ",
    "mass",
    "no mass",
    "kidneys",
    "therefore ",
    ". ",
    "\n",
    "or ",
    "是",
    "\u202e",
    "\ud800",
    "'",
    "  ",
]
COMPLETIONS = st.text(max_size=60) | st.lists(
    st.sampled_from(PIECES) | st.text(max_size=3), max_size=25
).map("".join)


@fuzzed
@given(COMPLETIONS, st.sampled_from(LETTERS))
def test_any_completion_is_scored_with_a_printable_reason(completion, answer):
    verdicts = score(completion, answer)
    assert [verdict.rule for verdict in verdicts] == list(RULES)
    assert all(0 <= verdict.score <= 1 and verdict.why.isprintable() for verdict in verdicts)
    assert all(len(verdict.why) < 300 for verdict in verdicts)
    assert read_letter(completion) in (None, *LETTERS)
