"""The changes that the probes make, and forced answers against a plain forward pass."""

from pathlib import Path

import pytest
import torch
from tiny_run import write_run

from common.config import load_config
from data import Question, load_vocabulary
from data.choice import prompt_encoder
from evaluation.probes import (
    letter_logprobs,
    opening,
    opening_of,
    original_letter,
    swapped_reasonings,
    truncated,
    with_rotated_options,
)
from model import load_model


def question(images: tuple[str, ...] = (), options: int = 3, answer: str = "A") -> Question:
    return Question(
        tuple(map(Path, images)), "What?", tuple("wxyz"[:options]), answer, "MRI", "", "row"
    )


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rotated_options_keep_the_right_text_and_letters_map_back(count):
    for index in range(count):
        old = question(options=count, answer="ABCD"[index])
        new = with_rotated_options(old)
        assert new.options != old.options and sorted(new.options) == sorted(old.options)
        assert new.options["ABCD".index(new.answer)] == old.options[index]
        assert original_letter(new.answer, count) == old.answer
    assert original_letter(None, count) is None and original_letter("J", count) is None


def test_reasoning_is_truncated_between_words():
    text = "  One two\nthree   four. "
    assert [truncated(text, kept) for kept in (0.0, 0.25, 0.5, 0.75, 1.0)] == [
        "",
        "  One",
        "  One two",
        "  One two\nthree",
        text,
    ]
    assert truncated("", 0.5) == "" and truncated(" ", 1.0) == " "


def test_swapped_reasoning_is_another_questions_and_differs_if_possible():
    reasonings = {0: "a", 1: "a", 3: "b", 4: "a", 6: "c"}
    swapped = swapped_reasonings(reasonings)
    assert list(swapped) == list(reasonings)
    assert all(swapped[place] != reasonings[place] for place in reasonings)
    assert swapped_reasonings({0: "a", 2: "a"}) == {0: "a", 2: "a"}
    assert swapped_reasonings({5: "a"}) == {5: "a"} and swapped_reasonings({}) == {}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>x</think> <answer>B</answer>", "<think>x</think> <answer>"),
        ("<answer>B</answer>", "<answer>"),
        ("<think>x</think>B", "<think>x</think><answer>"),
        ("B", "<think></think><answer>"),
    ],
)
def test_an_opening_is_the_models_own_text_up_to_its_letter(completion, expected):
    assert opening_of(completion) == expected


@torch.no_grad()
def test_forced_letters_have_the_logprobs_of_a_plain_forward_in_any_batch(
    tmp_path,
):
    config = load_config(write_run(tmp_path))
    model = load_model(config.model)
    vocabulary = load_vocabulary(config.model, model.config)
    encoder = prompt_encoder(vocabulary, model.config, config)
    images = [(str(tmp_path / "questions" / f"{i}.png"),) for i in (0, 7)]
    questions = [question(images[0], 2), question((), 4), question(images[1], 3)]
    openings = [opening("The image shows a mass."), "<answer>", opening("<|im_end|> é")]
    prompts = [encoder.encode(q) for q in questions]
    found = letter_logprobs(model, vocabulary, prompts, openings)
    assert [list(letters) for letters in found] == [list("AB"), list("ABCD"), list("ABC")]
    for prompt, text, letters in zip(prompts, openings, found, strict=True):
        rows = {letter: vocabulary.encode(f"{text}{letter}</answer>") for letter in letters}
        common = next(
            i for i, ids in enumerate(zip(*rows.values(), strict=False)) if len(set(ids)) > 1
        )
        for letter, ids in rows.items():
            sequence = torch.cat((prompt.tokens_P, torch.tensor(ids)))[None]
            logits = model(
                sequence, prompt.patches_SC if len(prompt.grids_I3) else None, prompt.grids_I3
            )[0]
            logp = logits.masked_fill(~vocabulary.allowed_V, float("-inf")).log_softmax(-1)
            start = len(prompt.tokens_P)
            expected = sum(float(logp[start + t - 1, ids[t]]) for t in range(common, len(ids)))
            assert letters[letter] == pytest.approx(expected, abs=1e-4)
        assert len({round(value, 3) for value in letters.values()}) == len(letters)
