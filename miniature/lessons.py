"""What the base is taught: examples of tokens, some of which carry the loss.

- Matching: given lettered options, name the letter of a word. Text only.
- Seeing: captions of a phantom, and the letters of what it shows in short lists of options.
- Answering: multiple-choice questions in the exact prompt of training and evaluation, at first
  answered rightly in each way, then by habit, as a mediocre reasoner would.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from data import Question
from data.prompt import prompt_text

from .phantoms import ATTRIBUTES, Case
from .questions import ask, right_option
from .tokenizer import SYSTEM
from .words import EMPTY_THOUGHTS, LETTERS, QUESTIONS, SPARE_NOUNS, VALUES, statement

IMAGE_TOKENS = 9
IMAGE = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
# What the chat template makes of one turn; the template itself would take most of a lesson's time.
CHAT = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QUERIES = 6  # for one list of options
TAGGED_QUERIES = 3  # they are four times as long
NOUNS = 0.7  # share of matching lessons with spare nouns, against learning the values by heart
CAPTION_STATEMENTS = 8
CAPTION_WEIGHTS = {"modality": 1, "anatomy": 2, "finding": 4, "side": 4}  # the hard ones more often
ANSWERS = 4  # for one prompt
EMPHASIS = 4  # weight of the value and of its letter beside the other tokens of an answer

RIGHT = 0.97  # share of right letters where the base shows what it can
GUESSES = (3, 1, 1, 1)  # chances of A, B, C and D where it guesses
# The habits: how often for the first phrasing of a question, how often for the other three, and the
# text. The letter is right for the first phrasing and after a thought on topic; else it is a guess.
# What only the first phrasing brings out is what GRPO and SFT can find, and carry over to the
# others. Guesses prefer A. If they were uniform, the model would not tell the phrasings apart: with
# right letters and guesses mixed, the right one stays the likeliest, and greedy decoding finds it.
BARE = "{letter}"
IN_TAGS = "<answer>{letter}</answer>"
ON_TOPIC = "<think>{on_topic}</think><answer>{letter}</answer>"
STYLES = (
    (0.50, 0.18, ON_TOPIC),
    (0.06, 0.25, "<think>{empty}</think><answer>{letter}</answer>"),
    (0.04, 0.05, "<think>{empty}</think><answer>{letter}) {option}</answer>"),
    (0.00, 0.15, "<think>{empty}</think>{letter}"),
    (0.00, 0.13, "{empty} The answer is {letter}."),
    (0.20, 0.12, IN_TAGS),
    (0.20, 0.12, BARE),
)
_FIRST, _OTHERS, _TEXTS = zip(*STYLES, strict=True)

Tokens = list[int]


@dataclass(frozen=True)
class Lesson:
    """Some answers to one prompt, the weight of each of their tokens in the loss, and the image
    whose tokens the prompt contains.
    """

    prompt: Tokens
    answers: list[Tokens]
    weights: list[Tokens]
    image: np.ndarray | None = None


class Teacher:
    """Makes examples; all randomness comes from one generator."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        # The tokenizer is trained so that each of these is one token.
        self.letters = [self.encode(letter)[0] for letter in LETTERS]
        self.answer_tag = self.encode("<answer>")[0]
        self.nouns = {word: self.encode(f" {word}")[0] for word in (*VALUES, *SPARE_NOUNS)}

    def encode(self, text: str) -> Tokens:
        return self.tokenizer.encode(text, add_special_tokens=False)

    # Matching

    def bare_matching(self) -> Lesson:
        """Options, then queries "word letter" drawn with replacement: the letter directly follows
        the word.

        With a longer way from word to letter, or with each option named once (which teaches
        elimination), the circuit does not form.
        """
        return self._matching(QUERIES, [])

    def tagged_matching(self) -> Lesson:
        """As bare matching, but the way from word to letter is that of a completion: "
        word.</think><answer>letter".
        """
        return self._matching(TAGGED_QUERIES, self.encode(".</think><answer>"))

    def _matching(self, queries: int, between: Tokens) -> Lesson:
        options = self._options()
        tokens = []
        for _ in range(queries):
            word, letter = self.rng.choice(options)
            # Joined as tokens: as text, " word" and "A" would become one word.
            tokens += [self.nouns[word], *between, letter]
        words = [word for word, _ in options]
        return _lesson(self.encode(options_text(words)), [tokens], self.letters)

    def chat_matching(self) -> Lesson:
        """Matching in the exact chat layout; the thoughts are given, only their letters are
        learned.
        """
        options = self._options()
        attribute = self.rng.choice(list(ATTRIBUTES))
        text = self.rng.choice(QUESTIONS[attribute])
        words = tuple(word for word, _ in options)
        question = Question((), text, words, LETTERS[0], "", attribute, "")
        prompt = self._chat(prompt_text(question))
        answers = []
        for word, letter in self.rng.choices(options, k=QUERIES):
            thought = statement(attribute, word, self.rng)
            answers.append([*self.encode(f"<think>{thought}</think><answer>"), letter])
        return _lesson(prompt, answers, self.letters)

    def _options(self) -> list[tuple[str, int]]:
        """2 to 4 different words, each with the token of its letter."""
        words = SPARE_NOUNS
        if self.rng.random() >= NOUNS:
            words = self.rng.choice(list(ATTRIBUTES.values()))
        count = self.rng.randint(2, min(len(LETTERS), len(words)))
        return list(zip(self.rng.sample(words, count), self.letters, strict=False))

    # Seeing

    def caption(self, image: np.ndarray, case: Case) -> Lesson:
        """The image, then statements about it drawn with replacement; only the values are learned.

        Which statement comes next is chance; learning that too would drown what the image tells.
        """
        known = case.known
        chances = [CAPTION_WEIGHTS[name] for name in known]
        names = self.rng.choices(list(known), chances, k=CAPTION_STATEMENTS)
        statements = [statement(name, known[name], self.rng) for name in names]
        tokens = self.encode(" ".join(statements))
        values = [self.nouns[value] for value in known.values()]
        return _lesson(self.encode(IMAGE), [tokens], values, image)

    def at_sight(self, image: np.ndarray, case: Case) -> Lesson:
        """The image, then for each attribute a list of options and the letter of the right one.

        Each attribute once: a second list could be answered from the letter of the first.
        """
        tokens, weights = [], []
        for attribute in self.rng.sample(list(case.known), len(case.known)):
            question = ask(case, self.rng, attribute)
            options = self.encode(options_text(question.options))
            tokens += [*options, self.letters[LETTERS.index(question.answer)]]
            weights += [0] * len(options) + [EMPHASIS]
        return Lesson(self.encode(IMAGE), [tokens], [weights], image)

    # Answering

    def answers(self, image: np.ndarray, case: Case) -> Lesson:
        """A question in the exact prompt of training and evaluation, answered rightly in each way:
        at once, at once in tags, and by a thought on topic.
        """
        question = ask(case, self.rng)
        texts = [self.answer(style, case, question) for style in (BARE, IN_TAGS, ON_TOPIC)]
        return self._answered(self.prompt(question), texts, question, image)

    def habits(self, image: np.ndarray, case: Case) -> Lesson:
        """A question in that prompt, and some of the base's ways to answer it."""
        question = ask(case, self.rng)
        answers = [self.completion(case, question) for _ in range(ANSWERS)]
        return self._answered(self.prompt(question), answers, question, image)

    def _answered(
        self, prompt: Tokens, texts: list[str], question: Question, image: np.ndarray
    ) -> Lesson:
        """Answers in which the right value and a letter in tags weigh more: two tokens of twenty,
        while the others are mostly chance.

        Not a letter at the beginning, which would change how often answers begin so.
        """
        answers = [self.encode(text + "<|im_end|>") for text in texts]
        value = self.nouns[right_option(question)]
        weights: list[Tokens] = []
        for answer in answers:
            weights.append([])
            for before, token in pairwise([0, *answer]):
                heavy = token == value or before == self.answer_tag
                weights[-1].append(EMPHASIS if heavy else 1)
        return Lesson(prompt, answers, weights, image)

    def prompt(self, question: Question) -> Tokens:
        return self._chat(IMAGE + prompt_text(question))

    def _chat(self, text: str) -> Tokens:
        return self.encode(CHAT.format(text))

    def completion(self, case: Case, question: Question) -> str:
        """An answer in one of the base's ways."""
        first_phrasing = question.question == QUESTIONS[question.question_type][0]
        chances = _FIRST if first_phrasing else _OTHERS
        style = self.rng.choices(_TEXTS, chances)[0]
        known = first_phrasing or style == ON_TOPIC
        return self.answer(style, case, question, right=RIGHT if known else 0.0)

    def answer(self, style: str, case: Case, question: Question, right: float = 1.0) -> str:
        """An answer in this style; the letter is right with probability `right`, else a guess,
        which may be right too.
        """
        letter = question.answer
        if self.rng.random() >= right:
            count = len(question.options)
            letter = self.rng.choices(LETTERS[:count], GUESSES[:count])[0]
        return style.format(
            on_topic=self._on_topic(case, question),
            empty=self.rng.choice(EMPTY_THOUGHTS),
            letter=letter,
            option=question.options[LETTERS.index(letter)],
        )

    def _on_topic(self, case: Case, question: Question) -> str:
        """A thought that names the answer, in a third of the cases after another observation."""
        thought = statement(question.question_type, right_option(question), self.rng)
        others = [name for name in case.known if name != question.question_type]
        if self.rng.random() < 1 / 3:
            other = self.rng.choice(others)
            thought = f"{statement(other, case.known[other], self.rng)} {thought}"
        return thought


def options_text(words: Sequence[str]) -> str:
    return "".join(f"{letter}) {word}\n" for letter, word in zip(LETTERS, words, strict=False))


def _lesson(
    prompt: Tokens,
    answers: list[Tokens],
    learned: Tokens,
    image: np.ndarray | None = None,
) -> Lesson:
    """A lesson in which only the tokens in `learned` carry the loss."""
    weights = []
    for answer in answers:
        weights.append([int(token in learned) for token in answer])
    return Lesson(prompt, answers, weights, image)
