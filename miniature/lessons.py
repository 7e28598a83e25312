"""What the base is taught: examples of tokens, some of which carry the loss.

- Matching: given lettered options, name the letter of a word. Text only.
- Seeing: captions and open questions about a phantom.
- Habits: multiple-choice questions in the exact prompt of training and evaluation, answered as a
  mediocre reasoner would.
"""

import random
from dataclasses import dataclass

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

# How often the base thinks on topic: for the first phrasing of each question, and for the other
# three. A behaviour that one phrasing brings out and the others seldom do is what GRPO can find and
# generalise.
ON_TOPIC = (0.66, 0.18)
ON_TOPIC_RIGHT = 0.97
# The other ways to answer: weight, chance that the letter is right (it is random otherwise), text.
# Of direct letters so few are right that the two hops from image to letter are not learned: made to
# answer at once, the base does as well as luck, and the way to reward leads through thoughts. The
# price is that SFT on letters finds little to build on.
OTHER_STYLES = (
    (0.28, 0.1, "<think>{thought}</think><answer>{letter}</answer>"),
    (0.08, 0.1, "<think>{thought}</think><answer>{letter}) {option}</answer>"),
    (0.20, 0.1, "<think>{thought}</think>{letter}"),
    (0.16, 0.1, "{thought} The answer is {letter}."),
    (0.12, 0.3, "<answer>{letter}</answer>"),
    (0.10, 0.3, "{letter}"),
    (0.06, 0.1, "{letter}) {option}"),
)
_STYLE_WEIGHTS = [weight for weight, _, _ in OTHER_STYLES]

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
        lines = [f"{letter}) {word}\n" for letter, (word, _) in zip(LETTERS, options, strict=False)]
        tokens = []
        for _ in range(queries):
            word, letter = self.rng.choice(options)
            # Joined as tokens: as text, " word" and "A" would become one word.
            tokens += [self.nouns[word], *between, letter]
        return _lesson(self.encode("".join(lines)), [tokens], self.letters)

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

    def open_question(self, image: np.ndarray, case: Case) -> Lesson:
        """A question without options in the chat layout, answered by a statement on topic."""
        question = ask(case, self.rng)
        answer = statement(question.question_type, right_option(question), self.rng)
        prompt = self._chat(IMAGE + question.question)
        return self._answered(prompt, [answer], question, image)

    # Habits

    def habits(self, image: np.ndarray, case: Case) -> Lesson:
        """A question in the exact prompt of training and evaluation, and some of the base's ways to
        answer it.
        """
        question = ask(case, self.rng)
        answers = [self.completion(case, question) for _ in range(ANSWERS)]
        return self._answered(self.prompt(question), answers, question, image)

    def _answered(
        self, prompt: Tokens, texts: list[str], question: Question, image: np.ndarray
    ) -> Lesson:
        answers = [self.encode(text + "<|im_end|>") for text in texts]
        weights = [self._emphasised(answer, question) for answer in answers]
        return Lesson(prompt, answers, weights, image)

    def _emphasised(self, answer: Tokens, question: Question) -> Tokens:
        """Weights of an answer: where it names the right value, that word and the letter after it
        weigh more.

        They are two tokens of twenty, and the others are mostly chance. How often each style occurs
        is not changed.
        """
        value = self.nouns[right_option(question)]
        weights = [1] * len(answer)
        # An answer that begins with its letter has named the option after it, not from the image.
        if value in answer and answer[0] not in self.letters:
            for at in range(answer.index(value), len(answer)):
                if answer[at] in (value, *self.letters):
                    weights[at] = EMPHASIS
        return weights

    def prompt(self, question: Question) -> Tokens:
        return self._chat(IMAGE + prompt_text(question))

    def _chat(self, text: str) -> Tokens:
        return self.encode(CHAT.format(text))

    def completion(self, case: Case, question: Question) -> str:
        """An answer in one of the base's ways."""
        first_phrasing = QUESTIONS[question.question_type][0]
        if self.rng.random() < ON_TOPIC[question.question != first_phrasing]:
            return self.on_topic(case, question)
        _, right, style = self.rng.choices(OTHER_STYLES, _STYLE_WEIGHTS)[0]
        letter = self._letter(question, right)
        option = question.options[LETTERS.index(letter)]
        thought = self.rng.choice(EMPTY_THOUGHTS)
        return style.format(thought=thought, letter=letter, option=option)

    def on_topic(self, case: Case, question: Question) -> str:
        """A thought that names the answer, in a third of the cases after another observation."""
        thought = statement(question.question_type, right_option(question), self.rng)
        others = [name for name in case.known if name != question.question_type]
        if self.rng.random() < 1 / 3:
            other = self.rng.choice(others)
            thought = f"{statement(other, case.known[other], self.rng)} {thought}"
        letter = self._letter(question, ON_TOPIC_RIGHT)
        return f"<think>{thought}</think><answer>{letter}</answer>"

    def _letter(self, question: Question, right: float) -> str:
        """The right letter with probability `right`, else a random one, which may be right too."""
        if self.rng.random() < right:
            return question.answer
        return self.rng.choice(LETTERS[: len(question.options)])


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
