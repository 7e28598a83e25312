"""What the base is taught: examples of tokens, some of which carry the loss.

- Matching: given lettered options, name the letter of a word. Text only.
- Seeing: captions and open questions about a phantom.
- Habits: multiple-choice questions in the exact prompt of training and evaluation, answered as a
  mediocre reasoner would.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from data.prompt import prompt_text
from data.question import Question

from .phantoms import ATTRIBUTES, Case
from .questions import Asked, ask
from .words import EMPTY_THOUGHTS, LETTERS, QUESTIONS, SPARE_NOUNS, VALUES, statement

IMAGE_TOKENS = 9
QUERIES, ANSWERS = 6, 4  # for one list of options; for one prompt
STATEMENTS_EACH, EMPHASIS = 8, 4
CAPTIONED = {
    "modality": 1,
    "anatomy": 2,
    "finding": 4,
    "side": 4,
}  # how often each is stated: the hard ones more
# How often the base thinks on topic: for the first phrasing of each question, and for the other
# three.
ON_TOPIC = (0.66, 0.18)
# The other ways to answer, with their weights. "letter" and "tagged letter" are right in
# DIRECT_RIGHT of the cases, all others in LUCKY_RIGHT; otherwise the letter is random.
OTHER_STYLES = {
    "empty thought": 0.28,
    "empty thought, letter and text": 0.08,
    "untagged answer": 0.20,
    "sentence": 0.16,
    "tagged letter": 0.12,
    "letter": 0.10,
    "letter and text": 0.06,
}
DIRECT_RIGHT, LUCKY_RIGHT, ON_TOPIC_RIGHT = 0.3, 0.1, 0.97


@dataclass(frozen=True)
class Example:
    """Tokens, the weight of each in the loss, and the pool's index of the image whose tokens they
    contain.
    """

    tokens: list[int]
    weights: list[int]
    image: int | None = None


@dataclass(frozen=True)
class Group:
    """Several answers to one prompt, which is then run only once; see
    `Qwen2VL.completion_hidden`.
    """

    prompt: list[int]
    answers: list[list[int]]
    weights: list[list[int]]
    image: int | None = None


class Teacher:
    """Makes examples; all randomness comes from one generator."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.letters = [self._one(letter) for letter in LETTERS]
        self.nouns = {word: self._one(f" {word}") for word in (*VALUES, *SPARE_NOUNS)}
        image = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
        self.image = self.encode(image)
        self.opening = self.encode(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        )
        self.reply = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.encode("<|im_end|>")
        self.bar = self.encode(")")
        self.newline = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _one(self, word: str) -> int:
        tokens = self.encode(word)
        if len(tokens) != 1:
            raise ValueError(f"{word!r} must be one token, not {len(tokens)}")
        return tokens[0]

    # Matching

    def bare_matching(self) -> Example:
        """Options, then queries "word letter" drawn with replacement: the letter directly follows
        the word.

        With a longer way from word to letter, or with each option asked once (which teaches
        elimination), the circuit does not form.
        """
        words, letters = self._options()
        tokens = self._option_lines(words)
        weights = [0] * len(tokens)
        for _ in range(QUERIES):
            at = self.rng.randrange(len(words))
            tokens += [self.nouns[words[at]], letters[at]]
            weights += [0, 1]
        return Example(tokens, weights)

    def tagged_matching(self) -> Example:
        """As bare matching, but the way from word to letter is that of a completion: "
        word.</think><answer>letter".
        """
        words, letters = self._options()
        tokens = self._option_lines(words)
        weights = [0] * len(tokens)
        between = self.encode(".</think><answer>")
        for _ in range(3):
            at = self.rng.randrange(len(words))
            tokens += [self.nouns[words[at]], *between, letters[at]]
            weights += [0] * (1 + len(between)) + [1]
        return Example(tokens, weights)

    def chat_matching(self) -> Group:
        """Matching in the exact chat layout; the thoughts are given, only their letters are
        learned.
        """
        words, letters = self._options()
        attribute = self.rng.choice(list(ATTRIBUTES))
        question = _as_question(self.rng.choice(QUESTIONS[attribute]), tuple(words))
        answers, weights = [], []
        for at in self.rng.choices(range(len(words)), k=QUERIES):
            thought = self.encode(
                f"<think>{statement(attribute, words[at], self.rng)}</think><answer>"
            )
            answers.append([*thought, letters[at]])
            weights.append([0] * len(thought) + [1])
        return Group(
            self.opening + self.encode(prompt_text(question)) + self.reply, answers, weights
        )

    def _options(self) -> tuple[list[str], list[int]]:
        """2 to 4 different words, in 70 % of cases random nouns, else values of one attribute; and
        their letters.
        """
        words = (
            SPARE_NOUNS
            if self.rng.random() < 0.7
            else list(self.rng.choice(list(ATTRIBUTES.values())))
        )
        words = self.rng.sample(words, self.rng.randint(2, min(4, len(words))))
        return words, self.letters[: len(words)]

    def _option_lines(self, words: list[str]) -> list[int]:
        lines = [
            [letter, *self.bar, self.nouns[word], *self.newline]
            for letter, word in zip(self.letters, words)
        ]
        return [token for line in lines for token in line]

    # Seeing

    def caption(self, case: Case, image: int) -> Example:
        """The image, then statements about it drawn with replacement; only the values are learned.

        Which statement comes next is chance; learning that too would drown what the image tells.
        """
        known = [name for name in ATTRIBUTES if case.value(name) is not None]
        names = self.rng.choices(known, [CAPTIONED[name] for name in known], k=STATEMENTS_EACH)
        tokens = self.encode(
            " ".join(statement(name, case.value(name), self.rng) for name in names)
        )
        values = {self.nouns[case.value(name)] for name in known}
        return Example(
            self.image + tokens, [0] * len(self.image) + [int(t in values) for t in tokens], image
        )

    def open_question(self, case: Case, image: int) -> Example:
        """A question without options in the chat layout, answered by a statement on topic."""
        asked = ask(case, self.rng)
        answer = self.encode(statement(asked.attribute, asked.answer, self.rng)) + self.end
        prompt = self.opening + self.image + self.encode(asked.question) + self.reply
        return Example(prompt + answer, [0] * len(prompt) + self._emphasised(answer, asked), image)

    # Habits

    def habits(self, case: Case, image: int) -> Group:
        """A question in the exact prompt of training and evaluation, and some of the base's ways to
        answer it.
        """
        asked = ask(case, self.rng)
        answers = [self.encode(self.completion(case, asked)) + self.end for _ in range(ANSWERS)]
        return Group(
            self.prompt(asked),
            answers,
            [self._emphasised(answer, asked) for answer in answers],
            image,
        )

    def _emphasised(self, answer: list[int], asked: Asked) -> list[int]:
        """Weights of an answer: where it names the value asked for, that word and the letter after
        it weigh more.

        They are two tokens of twenty, and the others are mostly chance. How often each style occurs
        is not changed.
        """
        value, weights = self.nouns[asked.answer], [1] * len(answer)
        if value in answer and answer[0] not in self.letters:
            for at in range(answer.index(value), len(answer)):
                if answer[at] == value or answer[at] in self.letters:
                    weights[at] = EMPHASIS
        return weights

    def prompt(self, asked: Asked) -> list[int]:
        text = prompt_text(_as_question(asked.question, asked.options))
        return self.opening + self.image + self.encode(text) + self.reply

    def completion(self, case: Case, asked: Asked) -> str:
        if self.rng.random() < ON_TOPIC[asked.phrasing > 0]:
            return self.on_topic(case, asked)
        style = self.rng.choices(list(OTHER_STYLES), list(OTHER_STYLES.values()))[0]
        letter = self._letter(
            asked, DIRECT_RIGHT if style in ("letter", "tagged letter") else LUCKY_RIGHT
        )
        option = asked.options[LETTERS.index(letter)]
        thought = self.rng.choice(EMPTY_THOUGHTS)
        return {
            "empty thought": f"<think>{thought}</think><answer>{letter}</answer>",
            "empty thought, letter and text": f"<think>{thought}</think><answer>{letter}) {option}</answer>",
            "untagged answer": f"<think>{thought}</think>{letter}",
            "sentence": f"{thought} The answer is {letter}.",
            "tagged letter": f"<answer>{letter}</answer>",
            "letter": letter,
            "letter and text": f"{letter}) {option}",
        }[style]

    def on_topic(self, case: Case, asked: Asked) -> str:
        """A thought that names what is asked for, in a third of the cases after another
        observation.
        """
        thought = statement(asked.attribute, asked.answer, self.rng)
        others = [
            name for name in ATTRIBUTES if name != asked.attribute and case.value(name) is not None
        ]
        if self.rng.random() < 1 / 3:
            other = self.rng.choice(others)
            thought = f"{statement(other, case.value(other), self.rng)} {thought}"
        return f"<think>{thought}</think><answer>{self._letter(asked, ON_TOPIC_RIGHT)}</answer>"

    def _letter(self, asked: Asked, right: float) -> str:
        return (
            asked.letter
            if self.rng.random() < right
            else self.rng.choice(LETTERS[: len(asked.options)])
        )


def _as_question(question: str, options: tuple[str, ...]) -> Question:
    """As much of a question as its prompt needs."""
    return Question((Path("phantom.png"),), question, options, LETTERS[0], "", "", "")
