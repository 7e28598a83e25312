"""The choice of questions: subsets, splits, and a stream that depends only on seed and step."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_encoder

from common.errors import InputError
from data import Question, prompts_of_steps, questions_of_step
from data.stream import permutation
from data.subset import choose_questions, split_by_image


def numbered(count):
    return [
        Question((), f"{number}", ("x", "y"), "A", "MRI", "", f"row {number}")
        for number in range(count)
    ]


def names(questions, steps, prompts_per_step, seed=0):
    return [
        question.question
        for step in steps
        for question in questions_of_step(questions, step, prompts_per_step, seed)
    ]


def test_no_question_is_dropped_or_repeated_where_an_epoch_ends_within_a_step():
    questions = numbered(10)
    order = names(questions, range(10), 3)
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch, key=int) == [str(number) for number in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_may_hold_more_than_an_epoch():
    order = names(numbered(3), [0], 7)
    assert len(order) == 7 and sorted(order[:3]) == sorted(order[3:6]) == ["0", "1", "2"]


def test_a_resumed_run_gets_the_same_questions():
    questions = numbered(11)
    permutation.cache_clear()
    later = names(questions, [7], 4)
    assert names(questions, range(8), 4)[28:] == later


def test_seeds_give_different_orders():
    questions = numbered(20)
    assert names(questions, [0], 20, seed=1) != names(questions, [0], 20, seed=2)


def test_the_order_is_the_same_on_every_machine_and_version():
    assert permutation(8, "epoch 0 0") == (0, 5, 6, 4, 3, 1, 2, 7)
    assert names(numbered(8), [0], 8) == [str(number) for number in (0, 5, 6, 4, 3, 1, 2, 7)]


def test_every_question_is_equally_likely_to_come_first():
    firsts = [permutation(4, f"epoch {seed} 0")[0] for seed in range(2000)]
    assert all(440 <= firsts.count(number) <= 560 for number in range(4))


@pytest.fixture
def many():
    """60 MRI, 30 CT and 10 X-ray questions, two to an image."""
    names = ["MRI"] * 60 + ["CT"] * 30 + ["X-ray"] * 10
    questions = zip(numbered(100), names, strict=True)
    return [
        replace(question, images=(Path(f"{index // 2}.png"),), modality=name)
        for index, (question, name) in enumerate(questions)
    ]


def test_choice_is_seeded_by_modality_ordered_and_nested(many):
    chosen = choose_questions(many, "CT(Computed Tomography)", 10, seed=1)
    assert len(chosen) == 10 and {question.modality for question in chosen} == {"CT"}
    assert (
        chosen
        == choose_questions(many, "CT", 10, seed=1)
        != choose_questions(many, "CT", 10, seed=2)
    )
    assert chosen == [question for question in many if question in chosen]
    larger = choose_questions(many, "CT", 20, seed=1)
    assert all(question in larger for question in chosen)
    assert choose_questions(many) == many


def test_a_count_that_is_too_large_lists_the_available_questions(many):
    available = r"\(available: CT 30, MRI 60, X-ray 10\)"
    with pytest.raises(InputError, match=f"only 30 questions of CT for a count of 31 {available}"):
        choose_questions(many, "CT", 31)
    with pytest.raises(InputError, match=f"only 0 questions of PET .*{available}"):
        choose_questions(many, "PET")
    with pytest.raises(
        InputError, match=f"only 100 questions of any modality for a count of 101 {available}"
    ):
        choose_questions(many, count=101)
    with pytest.raises(InputError, match="only 0 questions .* .available: none"):
        choose_questions([])


def test_train_and_test_never_share_an_image(many):
    train, test = split_by_image(many, 0.2, seed=3)
    images = [{image for question in part for image in question.images} for part in (train, test)]
    assert not images[0] & images[1]
    assert sorted(train + test, key=many.index) == many and len(test) == 20
    assert (train, test) == split_by_image(many, 0.2, seed=3) != split_by_image(many, 0.2, seed=4)


def test_questions_chained_through_several_images_stay_together(many):
    shared = [
        replace(question, images=(Path(f"{index}"), Path(f"{index + 1}")))
        if index < 50
        else question
        for index, question in enumerate(many)
    ]
    train, test = split_by_image(shared, 0.3, seed=0)
    chain = set(shared[:50])
    assert chain <= set(train) and 0 < len(test) <= 30
    with pytest.raises(InputError, match="can't be split"):
        split_by_image(shared[:50], 0.3, seed=0)
    with pytest.raises(InputError, match="can't be split"):
        split_by_image(many, 1.0, seed=0)


def test_a_chain_is_followed_in_both_directions_and_through_many_questions_of_one_image():
    questions = [
        replace(question, images=(Path(f"{index}"), Path(f"{index - 1}"), Path("all")))
        for index, question in enumerate(numbered(20_000))
    ]
    alone = replace(questions[0], images=(Path("alone"),))
    started = time.process_time()
    train, test = split_by_image([alone, *questions], 0.5, seed=0)
    assert (train, test) == (questions, [alone])
    assert time.process_time() - started < 5  # a tenth of a second when idle


def test_prefetched_prompts_are_those_of_each_step_and_a_bad_one_is_reported_at_its_step(prompts):
    """With real images, because a fake encoder would prove nothing about threads."""
    encoder, questions = tiny_encoder(), [prompt.question for prompt in prompts]
    steps = range(2, 7)
    ahead = [list(made.values()) for made in prompts_of_steps(encoder, questions, steps, 2, 0)]
    assert len(ahead) == 5
    for step, made in zip(steps, ahead, strict=True):
        expected = questions_of_step(questions, step, 2, 0)
        assert [prompt.question for prompt in made] == expected
        for prompt, question in zip(made, expected, strict=True):
            alone = encoder.encode(question)
            assert torch.equal(prompt.tokens_P, alone.tokens_P) and torch.equal(
                prompt.patches_SC, alone.patches_SC
            )
            assert torch.equal(prompt.positions_3P, alone.positions_3P)

    broken = [*questions, replace(questions[1], images=(Path("gone.png"),))]
    stream = prompts_of_steps(encoder, broken, range(4), 1, 0)
    with pytest.raises(InputError, match="gone.png"):
        for step in range(4):
            at = questions_of_step(broken, step, 1, 0)[0]
            next(stream)
            assert at.images != (Path("gone.png"),)
    assert list(prompts_of_steps(encoder, questions, range(3, 3), 2, 0)) == []


def test_stopping_does_not_wait_for_images_that_are_no_longer_needed(prompts):
    encoder, questions = tiny_encoder(), [prompt.question for prompt in prompts] * 20
    patchify, started = encoder.patchify, []
    encoder.patchify = lambda question, load: (
        started.append(question) or time.sleep(0.05) or patchify(question, load)
    )
    stream = prompts_of_steps(encoder, questions, range(2), 30, 0)
    next(stream)
    stream.close()
    assert 30 <= len(started) < 50
