"""The miniature: phantoms, questions, tokenizer and the base that is shipped."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data import PromptEncoder, Question, read_questions
from data.vocabulary import load_vocabulary
from miniature.base import SEED
from miniature.batches import lesson_loss
from miniature.card import write_card
from miniature.lessons import (
    BARE,
    EMPHASIS,
    IN_TAGS,
    ON_TOPIC,
    STYLES,
    Lesson,
    Teacher,
)
from miniature.measure import check_prompts, forced_rates
from miniature.phantoms import ANATOMIES, ATTRIBUTES, FINDINGS, MODALITIES, Case, draw, sample_case
from miniature.pool import STREAMS, draw_one, draw_pool, grey_patches
from miniature.questions import ask, right_option, write_questions
from miniature.stages import attribute_labels
from miniature.tokenizer import TAGS, build_tokenizer
from miniature.training import fit
from miniature.words import LETTERS, QUESTIONS, SPARE_NOUNS, VALUES
from model import load_model, read_config
from rewards import accuracy_reward, format_reward, read_letter

BASE = Path(__file__).resolve().parent.parent / "miniature" / "base"
SPLITS = {
    "train": (("MRI", 12),),
    "validation": (("MRI", 6),),
    "test": (("MRI", 5), ("CT", 5), ("radiograph", 5)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("miniature")
    write_questions(path, SPLITS)
    return path


def test_every_body_part_modality_and_finding_can_be_drawn_and_looks_different() -> None:
    images = set()
    for modality in MODALITIES:
        for anatomy in ANATOMIES:
            for finding in FINDINGS:
                case = Case(modality, anatomy, finding, None if finding == "normal" else "left")
                image = draw(case, np.random.default_rng(0))
                assert image.shape == (84, 84) and image.dtype == np.uint8 and image.std() > 20
                images.add(image.tobytes())
    assert len(images) == len(MODALITIES) * len(ANATOMIES) * len(FINDINGS)


def test_a_finding_changes_its_own_half_of_the_image() -> None:
    def darkness(side: str | None, finding: str) -> np.ndarray:
        return draw(Case("CT", "pelvis", finding, side), np.random.default_rng(3)).astype(float)

    plain = darkness(None, "normal")
    for side, half in (("left", np.s_[:, :42]), ("right", np.s_[:, 42:])):
        change = np.abs(darkness(side, "mass") - plain)
        assert change[half].sum() > 0.6 * change.sum()


def test_an_image_depends_on_nothing_but_seed_stream_and_index() -> None:
    image, case = draw_one(1, "train", 5)
    again, same = draw_one(1, "train", 5)
    assert case == same and (image == again).all()
    others = [draw_one(*key)[0] for key in ((2, "train", 5), (1, "test", 5), (1, "train", 6))]
    assert all((image != other).any() for other in others)


def test_a_side_is_known_exactly_when_something_is_found() -> None:
    cases = [sample_case(np.random.default_rng(seed)) for seed in range(100)]
    assert all((case.side is None) == (case.finding == "normal") for case in cases)


def test_patches_of_the_pool_are_those_of_the_data_package(folder: Path) -> None:
    vocabulary = load_vocabulary(BASE, load_model(BASE).config)
    questions = read_questions(folder / "train.json")[:2]
    prompts = [encoder(vocabulary).encode(question) for question in questions]
    images = [draw_one(2025, "train", index, "MRI")[0] for index in range(2)]
    patches, grids = grey_patches(images)
    assert torch.equal(grids, torch.cat([prompt.grids_I3 for prompt in prompts]))
    assert torch.equal(patches, torch.cat([prompt.patches_SC for prompt in prompts]))


def test_question_files_are_read_by_the_data_package_with_valid_letters(folder: Path) -> None:
    for split, parts in SPLITS.items():
        questions = read_questions(folder / f"{split}.json")
        assert len(questions) == sum(count for _, count in parts)
        for question in questions:
            assert 2 <= len(question.options) <= 4 and len(set(question.options)) == len(
                question.options
            )
            assert question.answer in LETTERS[: len(question.options)]
            assert question.question_type
    assert Counter(q.modality for q in questions) == {"MRI": 5, "CT": 5, "X-ray": 5}


def test_no_image_is_in_two_splits_or_twice_in_one(folder: Path) -> None:
    files = sorted((folder / "images").iterdir())
    assert len(files) == 33
    assert len({file.read_bytes() for file in files}) == len(files)
    assert len(set(STREAMS.values())) == len(STREAMS)


def test_the_same_seed_writes_the_same_bytes_and_a_second_call_writes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    def digest(path: Path) -> dict[str, str]:
        files = (file for file in path.rglob("*") if file.is_file())
        return {
            str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        }

    write_questions(tmp_path, SPLITS)
    assert digest(tmp_path) == digest(folder)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    write_questions(tmp_path, SPLITS)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


def test_options_and_letter_tell_nothing_about_the_answer() -> None:
    """A reader who knows, for each question, which value is most often right must not beat chance
    by much.
    """
    rng, cases = random.Random(0), np.random.default_rng(0)
    questions = [ask(sample_case(cases), rng) for _ in range(6000)]
    chance = np.mean([1 / len(question.options) for question in questions])
    half = len(questions) // 2
    answers = Counter(
        right_option(question) for question in questions[:half]
    )  # no value is in two types
    guesses = []
    for question in questions[half:]:
        guess = max(question.options, key=answers.__getitem__)
        guesses.append(guess == right_option(question))
    assert abs(np.mean(guesses) - chance) < 0.04
    for count in (2, 3, 4):
        letters = Counter(q.answer for q in questions if len(q.options) == count)
        assert all(abs(n / letters.total() - 1 / count) < 0.05 for n in letters.values())


def test_every_letter_and_every_option_word_with_its_space_is_one_token(tokenizer) -> None:
    assert all(len(tokenizer.encode(letter)) == 1 for letter in LETTERS)
    for word in (*VALUES, *SPARE_NOUNS):
        assert len(tokenizer.encode(f" {word}")) == 1, word


def test_tags_are_ordinary_tokens_that_decoding_keeps(tokenizer) -> None:
    text = "<think>The finding is mass.</think><answer>B</answer>"
    assert tokenizer.decode(tokenizer.encode(text + "<|im_end|>"), skip_special_tokens=True) == text
    assert all(len(tokenizer.encode(tag)) == 1 for tag in TAGS)


def test_all_words_of_the_questions_are_whole_tokens(tokenizer) -> None:
    for phrasings in QUESTIONS.values():
        for question in phrasings:
            assert len(tokenizer.encode(question)) <= len(question.split()) + 2, question


def test_habits_follow_the_format_in_about_half_of_the_answers_and_are_right_when_on_topic(
    tokenizer,
) -> None:
    teacher, cases = Teacher(tokenizer, 0), np.random.default_rng(0)
    formatted, right = [], []
    for _ in range(2000):
        case = sample_case(cases)
        question = ask(case, teacher.rng)
        formatted.append(format_reward(teacher.completion(case, question)))
        thought = teacher.answer(ON_TOPIC, case, question)
        right.append(accuracy_reward(thought, question.answer))
    assert 0.4 < np.mean(formatted) < 0.65
    assert np.mean(right) == 1
    for column in (0, 1):
        assert abs(sum(style[column] for style in STYLES) - 1) < 1e-9
    # In tags as often as bare, or one of them would stay too good.
    assert len({style[:2] for style in STYLES if style[2] in (BARE, IN_TAGS)}) == 1


def test_letters_without_a_thought_on_topic_are_right_for_the_first_phrasing_only(
    tokenizer,
) -> None:
    teacher, case = Teacher(tokenizer, 0), Case("CT", "knee", "mass", "left")
    for place, phrasing in enumerate(QUESTIONS["finding"]):
        question = Question((), phrasing, ("normal", "mass"), "B", "", "finding", "")
        answers = [teacher.completion(case, question) for _ in range(2000)]
        letters = [answer for answer in answers if answer in LETTERS]
        tagged = [answer for answer in answers if answer.startswith("<answer>")]
        for texts in (letters, tagged):
            assert len(texts) > 100
            right = np.mean([read_letter(text) == "B" for text in texts])
            assert right > 0.9 if place == 0 else abs(right - 0.25) < 0.1


def test_every_way_of_answering_is_taught_and_a_letter_in_tags_weighs_more(tokenizer) -> None:
    teacher = Teacher(tokenizer, 0)
    for index in range(20):
        lesson = teacher.answers(*draw_one(1, "train", index))
        texts = [tokenizer.decode(answer[:-1]) for answer in lesson.answers]
        letter, tagged, thought = texts
        assert letter in LETTERS and tagged == f"<answer>{letter}</answer>"
        assert thought.startswith("<think>") and thought.endswith(f"</think>{tagged}")
        assert lesson.weights[0] == [1, 1]
        assert lesson.weights[1] == [1, EMPHASIS, 1, 1]
        assert Counter(lesson.weights[2])[EMPHASIS] == 2  # the value, and the letter


def test_a_list_at_sight_asks_for_each_attribute_once_and_teaches_only_its_letter(
    tokenizer,
) -> None:
    teacher = Teacher(tokenizer, 0)
    for index in range(20):
        image, case = draw_one(1, "train", index)
        lesson = teacher.at_sight(image, case)
        pairs = zip(lesson.answers[0], lesson.weights[0], strict=True)
        learned = [token for token, weight in pairs if weight]
        assert len(learned) == len(case.known) and set(learned) <= set(teacher.letters)
        words = [tokenizer.decode(token).strip() for token in lesson.answers[0]]
        for name, value in case.known.items():
            assert words.count(value) == 1, name


def test_the_teachers_prompt_is_the_prompt_of_training(folder: Path, tokenizer) -> None:
    question = read_questions(folder / "train.json")[0]
    prompt = encoder(load_vocabulary(BASE, load_model(BASE).config)).encode(question)
    _, case = draw_one(2025, "train", 0, "MRI")
    phantom_question = ask(case, random.Random("2025/train/0"))
    assert Teacher(tokenizer, 0).prompt(phantom_question) == prompt.tokens_P.tolist()


def test_padding_and_sharing_the_prompt_do_not_change_the_loss(tokenizer) -> None:
    teacher, model = Teacher(tokenizer, 0), load_model(BASE)
    phantom = draw_one(1, "train", 0)
    lessons = [teacher.bare_matching(), teacher.caption(*phantom), teacher.tagged_matching()]
    lessons += [teacher.habits(*phantom), teacher.habits(*phantom), teacher.chat_matching()]
    alone = []
    for lesson in lessons:
        for answer, weights in zip(lesson.answers, lesson.weights, strict=True):
            alone.append(Lesson(lesson.prompt, [answer], [weights], lesson.image))
    weights = [sum(lesson.weights[0]) for lesson in alone]
    with torch.no_grad():
        together = lesson_loss(model, lessons)
        losses = [lesson_loss(model, [lesson]) for lesson in alone]
    apart = np.average([loss.item() for loss in losses], weights=weights)
    torch.testing.assert_close(together.item(), apart.item(), atol=1e-4, rtol=1e-4)


def test_a_pool_is_the_images_of_its_stream_in_order() -> None:
    pool = draw_pool(1, "base", 300)
    assert len(pool) == 300
    for index in (0, 249, 250, 299):  # processes draw them in chunks
        image, case = draw_one(1, "base", index)
        assert case == pool[index][1] and (image == pool[index][0]).all()


def test_labels_are_places_among_the_values_and_a_missing_side_is_ignored() -> None:
    cases = [Case("CT", "knee", "mass", "right"), Case("MRI", "hand", "normal", None)]
    labels = attribute_labels([(np.zeros((84, 84), np.uint8), case) for case in cases])
    assert labels.tolist() == [[1, 1, 1, 1], [0, 6, 0, -100]]


def test_fitting_takes_as_many_batches_as_steps_and_leaves_frozen_parameters_alone() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    layers[0].requires_grad_(False)
    frozen = layers[0].weight.clone()
    inputs, batches = torch.ones(2, 4), []

    def losses() -> Iterator[torch.Tensor]:
        while True:
            batches.append(inputs)
            yield layers(inputs).square().mean()

    first = next(losses()).item()
    fit("test", layers, losses(), steps=30, rate=0.1)
    assert len(batches) == 31 and torch.equal(layers[0].weight, frozen)
    assert next(losses()).item() < first


def test_the_shipped_card_is_the_text_that_would_be_written_again(tmp_path: Path) -> None:
    card = (BASE / "README.md").read_text()
    minutes = next(word for word in card.split() if word.isdigit() and f"{word} minutes" in card)
    write_card(tmp_path / "README.md", read_card(), float(minutes))
    assert (tmp_path / "README.md").read_text() == card


def read_card() -> dict[str, dict[str, float]]:
    """The shipped card's table: by modality, rates in 0..1 and counts."""
    card = (BASE / "README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith("|")]
    modalities = lines[0].strip("| ").split(" | ")
    results: dict[str, dict[str, float]] = {modality: {} for modality in modalities}
    for line in lines[2:]:
        label, *cells = line.strip("| ").split(" | ")
        for modality, cell in zip(modalities, cells, strict=True):
            results[modality][label] = float(cell) / 100 if "." in cell else int(cell)
    return results


WAYS = (
    "made to give a letter: right",
    "made to give a letter in tags: right",
    "made to think on topic: right",
)
HIDDEN = (*WAYS[:2], "greedy: right", "greedy after `<think>`: right")


@pytest.mark.parametrize("modality", MODALITIES)
def test_both_ways_of_answering_were_taught_and_are_hidden_by_habit(modality: str) -> None:
    taught, shipped = read_card()[f"{modality}, before habits"], read_card()[modality]
    assert all(taught[way] > 0.95 for way in WAYS)
    assert all(0.40 <= shipped[way] <= 0.65 for way in HIDDEN)
    assert 0.45 <= shipped["sampled: format followed"] <= 0.60


def test_the_shipped_weights_are_those_that_the_card_measured() -> None:
    model = load_model(BASE, device="cpu", dtype=torch.float32)
    vocabulary = load_vocabulary(BASE, model.config)
    prompts = check_prompts(model, vocabulary, SEED)["CT"]
    card = read_card()["CT"]
    assert len(prompts) == card["questions"]
    rates = forced_rates(model, vocabulary, prompts[:100])
    for way in WAYS:  # three standard errors of a hundred questions
        assert abs(rates[way] - card[way]) < 0.15


def test_the_base_is_small_and_loads_here_and_in_transformers() -> None:
    assert sum(file.stat().st_size for file in BASE.rglob("*")) <= 8 * 2**20
    model = load_model(BASE, device="cpu", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert load_vocabulary(BASE, model.config).end_ids == (
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )


def encoder(vocabulary) -> PromptEncoder:
    return PromptEncoder(
        vocabulary.tokenizer,
        read_config(BASE),
        min_pixels=3136,
        max_pixels=401408,
        max_prompt_tokens=512,
    )


def test_attributes_have_values_that_do_not_overlap() -> None:
    assert len(set(VALUES)) == sum(map(len, ATTRIBUTES.values()))
    assert not set(VALUES) & set(SPARE_NOUNS)
