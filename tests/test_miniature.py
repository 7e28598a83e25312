"""The miniature: phantoms, questions, tokenizer and the base that is shipped."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data import PromptEncoder, read_questions
from data.vocabulary import load_vocabulary
from miniature.batches import lesson_loss
from miniature.lessons import OTHER_STYLES, Example, Teacher
from miniature.phantoms import ANATOMIES, ATTRIBUTES, FINDINGS, MODALITIES, Case, draw, sample_case
from miniature.pool import STREAMS, Pool, draw_one, grey_patches
from miniature.questions import ask, write_questions
from miniature.tokenizer import TAGS, build_tokenizer
from miniature.words import LETTERS, QUESTIONS, SPARE_NOUNS, VALUES
from model import load_model
from rewards import accuracy_reward, format_reward

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
    question = read_questions(folder / "train.json")[0]
    vocabulary = load_vocabulary(BASE, load_model(BASE).config)
    prompt = encoder(vocabulary).encode(question)
    grey, _ = draw_one(2025, "train", 0, "MRI")
    patches, grids = grey_patches(torch.from_numpy(grey[None]))
    assert torch.equal(grids, prompt.grids_I3)
    torch.testing.assert_close(patches, prompt.patches_SC, atol=1e-5, rtol=0)


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
    asked = [ask(sample_case(cases), rng) for _ in range(6000)]
    chance = np.mean([1 / len(one.options) for one in asked])
    half = len(asked) // 2
    seen = Counter((one.attribute, one.answer) for one in asked[:half])
    guesses = [
        max(one.options, key=lambda v, a=one.attribute: seen[a, v]) == one.answer
        for one in asked[half:]
    ]
    assert abs(np.mean(guesses) - chance) < 0.04
    for count in (2, 3, 4):
        letters = Counter(one.letter for one in asked if len(one.options) == count)
        assert all(abs(n / letters.total() - 1 / count) < 0.05 for n in letters.values())


def test_every_option_word_is_one_token_with_its_space(tokenizer) -> None:
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
        asked = ask(case, teacher.rng)
        formatted.append(format_reward(teacher.completion(case, asked)))
        right.append(accuracy_reward(teacher.on_topic(case, asked), asked.letter))
    assert 0.4 < np.mean(formatted) < 0.65
    assert np.mean(right) > 0.95
    assert abs(sum(OTHER_STYLES.values()) - 1) < 1e-9


def test_the_teachers_prompt_is_the_prompt_of_training(folder: Path, tokenizer) -> None:
    question = read_questions(folder / "train.json")[0]
    prompt = encoder(load_vocabulary(BASE, load_model(BASE).config)).encode(question)
    _, case = draw_one(2025, "train", 0, "MRI")
    asked = ask(case, random.Random("2025/train/0"))
    assert Teacher(tokenizer, 0).prompt(asked) == prompt.tokens_P.tolist()


def test_padding_and_sharing_the_prompt_do_not_change_the_loss(tokenizer) -> None:
    teacher = Teacher(tokenizer, 0)
    image, case = draw_one(1, "train", 0)
    pool, model = Pool(image[None], [case]), load_model(BASE)
    examples = [teacher.bare_matching(), teacher.caption(case, 0), teacher.tagged_matching()]
    groups = [teacher.habits(case, 0), teacher.habits(case, 0)]
    alone = examples + [
        Example(group.prompt + answer, [0] * len(group.prompt) + weights, group.image)
        for group in groups
        for answer, weights in zip(group.answers, group.weights)
    ]
    with torch.no_grad():
        together = lesson_loss(model, examples, groups, pool)
        losses = [lesson_loss(model, [one], (), pool) * sum(one.weights) for one in alone]
    torch.testing.assert_close(
        together, sum(losses) / sum(sum(one.weights) for one in alone), atol=1e-4, rtol=1e-4
    )


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
        vocabulary.tokenizer, image_token_id=vocabulary.tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        min_pixels=3136, max_pixels=401408, max_prompt_tokens=512,
    )  # fmt: skip


def test_attributes_have_values_that_do_not_overlap() -> None:
    assert len(set(VALUES)) == sum(map(len, ATTRIBUTES.values()))
    assert not set(VALUES) & set(SPARE_NOUNS)
