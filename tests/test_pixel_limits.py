"""A checkpoint's limits on image area, here and in transformers."""

import json
import sys

import pytest
from tiny_run import write_run

import evaluate
import train
from common.errors import InputError
from data.pixel_limits import FILE, read_pixel_limits, with_pixel_limits
from evaluation import ask

PUBLISHED = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "min_pixels": 3136}


def run(monkeypatch, program, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, flags)])
    return program.main()


def test_a_trained_model_carries_its_limits_and_ask_obeys_them(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, steps=1, min_pixels=2000, max_pixels=4500, save_every=1)
    assert run(monkeypatch, train, "--config", config) == 0
    limits = {"min_pixels": 2000, "max_pixels": 4500}
    model = tmp_path / "run" / "model"
    assert read_pixel_limits(model) == limits
    assert read_pixel_limits(tmp_path / "run" / "checkpoints" / "step-000001") == limits
    encoders, load = [], ask.load_examinee

    def noted(*arguments):
        examinee = load(*arguments)
        encoders.append(examinee.encoder)
        return examinee

    monkeypatch.setattr(ask, "load_examinee", noted)
    flags = ("--ask", "What?", "--options", "a", "b", "--image", tmp_path / "questions" / "9.png")
    for more in ((), ("--max_pixels", "3500")):
        assert run(monkeypatch, evaluate, *flags, "--model", model, *more) == 0
    limits = [(encoder.min_pixels, encoder.max_pixels) for encoder in encoders]
    assert limits == [(2000, 4500), (2000, 3500)]


def test_other_fields_of_the_file_stay_and_transformers_reads_a_new_one(tmp_path):
    written = json.dumps(PUBLISHED | {"size": {"longest_edge": 9}})
    (tmp_path / FILE).write_text(written)
    (tmp_path / "merges.txt").write_text("x")
    changed = with_pixel_limits(tmp_path, 2000, 4500)
    assert json.loads(changed[FILE]) == PUBLISHED | {"min_pixels": 2000, "max_pixels": 4500}
    assert changed["merges.txt"] == b"x" and (tmp_path / FILE).read_text() == written
    (tmp_path / FILE).unlink()
    transformers = pytest.importorskip("transformers")
    for limits in (changed, with_pixel_limits(tmp_path, 2000, 4500)):
        (tmp_path / FILE).write_bytes(limits[FILE])
        size = transformers.Qwen2VLImageProcessor.from_pretrained(tmp_path).size
        assert (size["shortest_edge"], size["longest_edge"]) == (2000, 4500)


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        (None, {}),
        ("{}", {}),
        (json.dumps(PUBLISHED), {"min_pixels": 3136}),
        ('{"size": {"shortest_edge": 5, "longest_edge": 70}}', {"min_pixels": 5, "max_pixels": 70}),
    ],
)
def test_limits_are_read_in_either_layout(tmp_path, written, limits):
    if written is not None:
        (tmp_path / FILE).write_text(written)
    assert read_pixel_limits(tmp_path) == limits


@pytest.mark.parametrize("written", ["{", "[1]", "5", "[" * 100_000, '{"max_pixels": "many"}'])
def test_a_file_of_nonsense_is_one_line(tmp_path, written):
    (tmp_path / FILE).write_text(written)
    with pytest.raises(InputError, match=FILE):
        read_pixel_limits(tmp_path)
    if "many" not in written:
        with pytest.raises(InputError, match=FILE):
            with_pixel_limits(tmp_path, 1, 2)
