"""Training and testing without sight: the substitutes for images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_run

from common.config import load_config
from data import Question, load_image
from data.unseeing import blank_image, noise_image, with_other_images
from training.prepare import prepared


def question(images: tuple[str, ...]) -> Question:
    return Question(tuple(map(Path, images)), "What?", ("w", "x"), "A", "MRI", "", "row")


def test_blank_and_noise_images_keep_the_size_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (30, 44, 3), dtype=np.uint8)).save(tmp_path / name)
    original, blank, noise = (
        np.asarray(f(tmp_path / "a.png")) for f in (load_image, blank_image, noise_image)
    )
    assert original.shape == blank.shape == noise.shape == (30, 44, 3)
    assert len(np.unique(blank)) == 1 and noise.std() > 60
    assert abs(np.corrcoef(original.ravel(), noise.ravel())[0, 1]) < 0.1
    assert (noise == np.asarray(noise_image(tmp_path / "a.png"))).all()
    assert (noise != np.asarray(noise_image(tmp_path / "b.png"))).any()


@pytest.mark.parametrize("count", [2, 3, 50])
def test_other_images_uses_all_images_and_gives_no_question_its_own(count):
    questions = [question((f"{i}.png",)) for i in range(count)]
    changed = with_other_images(questions)
    assert all(new.images != old.images for new, old in zip(changed, questions, strict=True))
    assert sorted(q.images for q in changed) == sorted(q.images for q in questions)


def test_questions_that_share_an_image_all_get_a_different_one():
    questions = [question((name,)) for name in ("a", "a", "b", "a", "b", "c")]
    changed = with_other_images(questions)
    assert all(new.images != old.images for new, old in zip(changed, questions, strict=True))
    assert {q.images for q in changed} == {q.images for q in questions}
    alone = [question(("a",))] * 3
    assert with_other_images(alone) == alone


def first_prompts(config):
    """For each question of a run's first step, the pixels in training and those in its test."""
    with prepared(config) as run:
        step = next(run.steps())
        return [(p.patches_SC, run.encoder.encode(p.question).patches_SC) for p in step.prompts]


@pytest.mark.parametrize("images", ["own", "blank", "noise", "other"])
@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_run_trains_on_the_images_of_its_config_and_is_tested_on_the_real_ones(
    tmp_path, images, method
):
    config = load_config(write_run(tmp_path, method=method), {"images": images})
    own = load_config(tmp_path / "config.toml", {"run_dir": str(tmp_path / "own")})
    for (trained, tested), (real, _) in zip(first_prompts(config), first_prompts(own), strict=True):
        if images == "other":  # the question itself has the other images, for leakage and records
            assert torch.equal(trained, tested) and not same(trained, real)
            continue
        assert torch.equal(tested, real) and same(trained, real) == (images == "own")
        blank = all((channel == channel[0]).all() for channel in trained.view(-1, 3, 392).unbind(1))
        assert blank == (images == "blank")


def same(a, b):
    return a.shape == b.shape and torch.equal(a, b)
