"""Files made to break a reader: each gives one printable line, in bounded time and memory."""

import json
import os
import signal
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from common.config import load_config
from common.errors import LONGEST_MESSAGE, InputError, printable
from common.files import LONGEST_LINE, MOST_BYTES
from data import load_image, read_questions
from data.images import image_size
from data.readers import MOST_LIST_BYTES
from data.rows import LONGEST_TEXT
from evaluation.audits.completions import read_completions
from model import read_config
from rewards import read_letter, score

ROW = {
    "image": ["scan.png"],
    "question": "What is seen?",
    "options": ["Cyst", "Mass"],
    "answer": "Mass",
}


@contextmanager
def within(seconds: float):
    """Context manager that fails the test instead of waiting for ever."""

    def stop(*_):
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(read, file, *parts) -> str:
    with within(20), pytest.raises(InputError) as caught:
        read(file)
    message = str(caught.value)
    assert message.isprintable() and len(message) <= LONGEST_MESSAGE
    assert all(part in message for part in parts), message
    return message


READERS = {
    "questions": read_questions,
    "completions": read_completions,
    "image": load_image,
    "image size": image_size,
    "config": load_config,
    "checkpoint": lambda file: read_config(file.parent),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_pipe_is_not_waited_for(read, tmp_path, in_docs):
    os.mkfifo(tmp_path / "config.json")
    message = refused(read, tmp_path / "config.json", "config.json", "a pipe or a device")
    if read is read_questions:
        in_docs("a pipe or a device in place of a file", message)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_an_endless_device_is_not_read(read, tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    refused(read, tmp_path / "config.json", "config.json", "a pipe or a device")


WHOLE = READERS.keys() - {"completions"}  # which are read line by line


@pytest.mark.parametrize("read", [READERS[name] for name in sorted(WHOLE)], ids=sorted(WHOLE))
def test_a_file_that_is_too_large_is_refused_before_it_is_read(read, tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # a sparse file: no space on disk, but much in memory
    tracemalloc.start()
    refused(
        read,
        tmp_path / "config.json",
        "config.json",
        "larger than the limit of 256 MB",
        "split or shrink it",
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_name_that_no_file_can_have_is_no_traceback(read):
    refused(read, Path("nul\0/config.json"), "nul\\x00")


def question_file(tmp_path, content):
    (tmp_path / "scan.png").touch()
    (tmp_path / "test.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    return tmp_path / "test.json"


LISTS = "[" + "[]," * 200_000 + "[]]"  # 600 kB that become 14 MB of empty lists
LONG = "x" * (LONGEST_LINE - 1000)


def test_a_list_takes_at_most_25_times_its_limit_and_a_longer_one_is_not_parsed(tmp_path):
    file = question_file(tmp_path, LISTS)
    tracemalloc.start()
    refused(read_questions, file, "row 1: this is a list")
    peak = tracemalloc.get_traced_memory()[1]
    question_file(tmp_path, "[" + " " * MOST_LIST_BYTES + "]")
    tracemalloc.reset_peak()
    refused(read_questions, file, "the JSON list is larger than 64 MB: write it as JSON lines")
    peak_of_refusal = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(LISTS) and peak_of_refusal < 3 * MOST_LIST_BYTES


def test_a_line_is_not_parsed_beyond_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.LONGEST_LINE", 10_000)
    file = question_file(tmp_path, '{"a": ' + LISTS)
    tracemalloc.start()
    refused(read_questions, file, "line 1: not JSON")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(LISTS)  # parsing all of it would take 25 times as much


def test_a_row_just_within_the_limit_is_read_and_one_beyond_is_not(tmp_path):
    row = json.dumps(ROW | {"note": LONG})
    assert len(read_questions(question_file(tmp_path, f"[{row}, {row}]"))) == 2
    assert len(read_questions(question_file(tmp_path, f" \n{row}\r\n \n{row}"))) == 2
    row = json.dumps(ROW | {"note": LONG + "x" * 1000})
    refused(read_questions, question_file(tmp_path, f"{row}\n{row}"), "line 1: not JSON")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\0" * 1000, "line 1: not JSON"),
        (json.dumps([ROW]).encode("utf-16"), "as UTF-8"),
        (b"\xff\xfe[1]", "as UTF-8"),
        ('{"question": "' + "x" * 10_000_000 + '"}', "line 1: not JSON"),
        (
            "[" + json.dumps(ROW | {"question": "x" * (LONGEST_TEXT + 1)}) + "]",
            "`question` holds 20,001 characters",
        ),
        (json.dumps([ROW | {"options": ["x"] * 10_000}]), "`options` has 10000 options"),
        (json.dumps([ROW | {"question": "\udc80"}]), "half of a surrogate"),
        (json.dumps([ROW | {"question": "\0"}]), "`question` holds NUL"),
        (
            json.dumps([ROW | {"\x1b[2J\u202e\ud800" * 1000: 1, "question": None}]),
            "`question` holds null",
        ),
        ('[{"a": ' * 100_000, "not readable as JSON"),
        ('{"a": ' * 100_000, "line 1: not JSON"),
        ('[{"image": "a", "image": "b"}]', "the field 'image' appears twice"),
        (
            '\n{"image": "a", "image": "b"}',
            "line 2: not JSON (the field 'image' appears twice",
        ),
        (json.dumps([ROW])[:-2] + ', "big": ' + "9" * 5000 + "}]", "not readable as JSON"),
        (json.dumps([ROW | {"options": [10**4000, float("inf")]}]), "`options` holds a number"),
        (json.dumps([ROW])[:-1], "not readable as JSON (Expecting ',' delimiter: line 1 column"),
        (json.dumps([ROW]) + "[]", "not readable as JSON (Extra data"),
        (json.dumps([ROW])[:-1] + ",]", "not readable as JSON (Expecting value"),
        (json.dumps(ROW) + " {}", "line 1: not JSON (Extra data"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW)[:-9], "line 2: not JSON"),
        ("\n" * 500_000 + "x", "line 500001: not JSON"),
    ],
    ids=lambda value: ascii(value[:12]),
)
def test_a_hostile_question_file_is_one_line(tmp_path, content, part):
    refused(read_questions, question_file(tmp_path, content), "test.json", part)


@pytest.mark.parametrize("unit", ["\n", ", ", "\n,", ",\n ", " A)", ",B)", "A)x,"])
def test_splitting_a_problem_takes_linear_time(tmp_path, unit, monkeypatch):
    monkeypatch.setattr("data.rows.LONGEST_TEXT", 1_000_000)
    row = {
        "image": "scan.png",
        "problem": "Q? A)x" + unit * (900_000 // len(json.dumps(unit))),
        "solution": "K",
    }
    started = time.process_time()
    refused(read_questions, question_file(tmp_path, json.dumps([row])), "row 1")
    assert time.process_time() - started < 5  # well under a second when idle


@pytest.mark.parametrize(
    "char", "\x1b\x9b\r\x7f\u202e\u2066\u200b\u2028\ufeff\ud800\U000e0041\u00ad", ids=ascii
)
def test_control_and_invisible_characters_are_escaped(char):
    assert printable(f"a{char}b").isascii() and printable(f"a{char}b").isprintable()
    assert str(InputError(f"a{char}b")) == printable(f"a{char}b")


def test_a_long_message_keeps_the_thing_and_the_remedy_and_loses_its_middle():
    for quoted in ("x" * 10**7, "\U000e0041" * 1000):
        message = str(InputError(f"test.json row 3: {quoted}: correct it"))
        assert len(message) <= LONGEST_MESSAGE and " ... " in message
        assert message.startswith("test.json row 3: ") and message.endswith(": correct it")
    exact = "x" * LONGEST_MESSAGE
    assert str(InputError(exact)) == exact and printable("é ü 脑 “MRI”") == "é ü 脑 “MRI”"


# Images

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000"]
)
def test_the_usual_formats_are_read_whatever_the_file_is_called(tmp_path, kind):
    Image.fromarray(PIXELS).save(tmp_path / "scan.jpg", format=kind)
    assert load_image(tmp_path / "scan.jpg").size == image_size(tmp_path / "scan.jpg") == (50, 40)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "SGI", "DDS"])
def test_a_format_for_which_pillow_runs_a_program_or_a_rare_decoder_is_refused(tmp_path, kind):
    Image.fromarray(PIXELS).save(tmp_path / "scan.png", format=kind)
    for read in (load_image, image_size):
        refused(
            read, tmp_path / "scan.png", "scan.png: not a readable image (UnidentifiedImageError"
        )


def test_a_text_that_unpacks_to_much_more_is_refused(tmp_path, in_docs):
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 50_000_000, zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "scan.png", pnginfo=text)
    assert (tmp_path / "scan.png").stat().st_size < 100_000
    message = refused(load_image, tmp_path / "scan.png", "scan.png")
    in_docs("an image whose comment unpacks to gigabytes", message)


def test_a_pipe_in_the_image_folder_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    file = question_file(tmp_path, json.dumps([ROW | {"image": ["pipe.png"]}]))
    refused(read_questions, file, "row 1", "`image`", "pipe.png")


# Completions

UNITS = (
    "B)",
    "a ",
    "no mass, ",
    "(",
    "*",
    "not ",
    "option ",
    "</answer>",
    "<think>",
    "\n",
    "\u200b",
    "\ufdfa",
    "is not ",
    "{B)",
    "which is ",
    "A or ",
    "'",
    "ß",
    "\ud800",
    "the left ",
)


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_ten_thousand_hostile_characters_are_scored_at_once(unit):
    text = (unit * 10_000)[:10_000]
    started = time.process_time()
    for completion in (
        text,
        f"<think>{text}</think><answer>{text[:900]}</answer>",
        f"<answer>{text}",
    ):
        verdicts = score(completion, "B")
        assert all(verdict.why.isprintable() for verdict in verdicts)
        assert read_letter(completion) in (None, *"ABCDEFGHIJ")
    assert (
        time.process_time() - started < 10
    )  # at most 2 s when idle; a quadratic pattern takes minutes
