r"""Read the option letter of an answer: one parser for the accuracy reward and for evaluation.

A letter (A to J, in either case) is chosen if it

- stands alone: "B", "b";
- or opens the answer or a line, or follows the word "answer", and is closed by punctuation or the
  end of the line: "B.", "(b)", "**B**", "B) Heart", "B - Heart", "B, there is ...", "Option B",
  "Answer: B", "The correct answer is B", "\boxed{B}".

It is not chosen if it is

- followed by a word: "A mass", "B cell lymphoma", and so "B Heart" too: in "A Heart" the A may be
  an article, and a reward that accepted "B Heart" but not "A Heart" would teach a model to avoid A;
- inside a word or a name: "CT", "B-cell", "A/P view", "hepatitis B";
- denied: "not A", "(A) is wrong";
- one of several different letters, in any role: "A or B", "A, B", "B, not A", "B) Vitamin D".

When in doubt, the parser reads no letter: the prompt asks for the letter alone. So some answers
that a person could read choose nothing: "B is correct", "I choose B", "Heart (B)", letters of other
scripts or styles. One error in the other direction is known: "C. difficile" chooses C.

Departure from MedVLM-R1's published code: that code upper-cases the answer and counts the
characters A-J in it, so that each "b" or "e" in a word is a letter. There, "B, there is no clear
..." and "B) Heart" score 0, and "mass" alone is an A.
"""

import re

LETTERS = "ABCDEFGHIJ"  # the published code's ten options
LONGEST_ANSWER = 1000  # characters; the patterns below are at worst quadratic in them

_ALONE = r"(?<!\w)(?<!\w[-'’.])"  # excludes the d of "I'd" and the g of "e.g."
# A full stop may be followed by a word ("B.Heart"), but not by a single letter ("e.g.", "U.S.").
_CLOSED = r"""(?=\s*(?:\Z|\n)|[])}<>*`",:;!?]|\s[-–]\s|[.'’](?!\w\b))"""
_NOT_DENIED = r"(?!\W*(?:is|was) ?(?:not|n['’]t|wrong|incorrect|false)\b)"

# A capital names an option even before a word, so that "B, C are possible" does not choose B. A and
# I are excluded, because they are words.
_NAMED = re.compile(rf"{_ALONE}(?:[B-HJ](?![\w'’-])|[A-Ja-j]{_CLOSED})")
# "*+" never backtracks: a run of brackets without a letter is scanned only once.
_CHOSEN = re.compile(
    r"(?:\A|\n|\b(?i:answer)\b)"
    r"(?:[\W_]|(?i:the|is|correct|right|best|option|choice|boxed)\b)*+"
    rf"{_ALONE}[A-Ja-j]{_CLOSED}{_NOT_DENIED}"
)


def parse_letter(text: str) -> str | None:
    """The option letter (A to J) that `text`, the content of an answer block, chooses, or None.

    Also None for more than `LONGEST_ANSWER` characters, not counting surrounding white space. Never
    raises.
    """
    if len(text.strip()) > LONGEST_ANSWER:
        return None
    text = visible(text)
    letters = {letter.upper() for letter in _NAMED.findall(text)}
    return letters.pop() if len(letters) == 1 and _CHOSEN.search(text) else None


def visible(text: str) -> str:
    """`text` without surrounding white space and invisible characters, such as zero-width ones."""
    return "".join(c for c in text if c.isprintable() or c.isspace()).strip()


def excerpt(text: str, longest: int = 40) -> str:
    """The beginning of `text`, quoted, with unprintable characters escaped: safe on a terminal."""
    return repr(text) if len(text) <= longest else repr(text[:longest]) + "..."
