"""The stream of questions: what a step trains on depends on the seed and the step alone."""

import pytest

from data import Question, questions_of_step
from data.stream import permutation
from model.errors import InputError


def numbered(count):
    return [Question((), f"{number}", ("x", "y"), "A", "MRI", "", f"row {number}") for number in range(count)]


def names(questions, steps, prompts_per_step, seed=0):
    return [
        question.question for step in steps for question in questions_of_step(questions, step, prompts_per_step, seed)
    ]


def test_no_question_is_dropped_or_repeated_where_an_epoch_ends_within_a_step():
    questions = numbered(10)
    seen = names(questions, range(10), 3)
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch, key=int) == [str(number) for number in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_may_hold_more_than_an_epoch():
    seen = names(numbered(3), [0], 7)
    assert len(seen) == 7 and sorted(seen[:3]) == sorted(seen[3:6]) == ["0", "1", "2"]


def test_a_resumed_run_sees_what_the_first_would_have_seen():
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


def test_the_first_place_is_fair():
    firsts = [permutation(4, f"epoch {seed} 0")[0] for seed in range(2000)]
    assert all(440 <= firsts.count(number) <= 560 for number in range(4))


def test_no_questions_is_an_input_error():
    with pytest.raises(InputError, match="no questions"):
        questions_of_step([], 0, 4, 0)
