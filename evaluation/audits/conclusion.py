"""Find the option that a reasoning concludes, from its text alone, by explicit rules.

An option is named by its text as whole words ("the knee", "kidneys" for "Kidney") or by its letter
if announced as such ("option B", "the answer is B", "B)"), but not by the article "A". Ignored in
an option's text: case, punctuation, a leading article or "No, it's", remarks in parentheses, and
everything after the first sentence. A single word in parentheses, "(MRI)", is a second name. The
text "no mass" names the option "no mass" and not the option "mass".

A mention that is denied or merely considered is no conclusion. As in NegEx (Chapman et al. 2001, J
Biomed Inform 34:301), a cue ("no signs of", "rather than", "used to diagnose") covers the rest of
its sentence up to a turn ("but", ", which"), and some cues ("is ruled out") cover the text before
them. Prose says more than such rules can read, so use conclusions only for rates over many
completions.

Time is linear in the length of the text.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from rewards import LETTERS

LONGEST_REASONING = 100_000  # characters; only the end of a longer reasoning is searched
_NEAR = 200  # characters around a mention that are searched for cues; bounds the work

# How an option is named
_GAP = r"[\W_]{1,4}"  # between a name's words; bounded, or a run of blanks takes quadratic time
_LETTER = (
    r"\b(?i:option|choice|letter|answer)(?i:\s(?:is|should be|would be|must be))?[\s:*(\[]{0,4}"
    r"([A-J])(?![\w'’-])|(?<![\w'’-])([A-J])\)"
)
_WORDS = re.compile(r"[^\W_]+")
_REMARK = re.compile(r"\([^()]*\)")
_ONE_WORD_REMARK = re.compile(r"\([^\w()]*([^\W_]+)[^\w()]*\)")
_LEAD = re.compile(
    r"\A\s*(?:(?:yes|no)[,.;:]\s*)?(?:(?:it['’]s|it is|it shows|this is|there is)\s)?"
    r"(?:(?:an?|the)\s)?"
)

# How a sentence qualifies a mention
_SENTENCE = re.compile(r"[.!?](?=\s|\Z)|\n")
_TURN = re.compile(
    r"[;:]|\b(?:but|however|although|though|while|whereas|therefore|thus|hence|because|since"
    r"|shows|suggests|indicates|reveals|appears"
    # the plural verbs state a finding too, except in "does not suggest", "that would suggest"
    r"|(?<!not )(?<!n't )(?<!would )(?<!that )(?:suggest|indicate))\b"
    r"|(?:,|\band) (?:the|there|it|this|these|we|so|which|suggesting|indicating|consistent)\b",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"\b(?:no|non|not(?! only)|cannot|without|neither|nor|never|than|instead of|unlike|except"
    r"|exclud\w+|rul\w+ out|absence of|lack of|free of"
    r"|used (?:to|(?:for|in) \w+ing)|(?:for|in|to) diagnos\w+"
    r"|(?:determine|assess|check|see) (?:if|whether))\b|n['’]t\b",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"(?:,?\s[^\W_]+){0,3}?\s"
    r"(?:(?:is|are|was|were|can be|has been)\s"
    r"(?:not|absent|excluded|unlikely|ruled out|wrong|incorrect)"
    r"|(?:is|are|was|were|does|do|ca)n['’]t|(?:does|do|can) not|cannot)\b"
    r"|[^.!?\n]{0,80}?\bwhich (?:is|are) not (?:visible|seen|present)\b",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"\b(?:therefore|thus|hence|consequently|in conclusion|conclude|answer"
    r"|(?:correct|best|right) (?:option|choice))\b",
    re.IGNORECASE,
)

Mention = tuple[str, int, int]
"""An option's letter, and the start and end of its name in the text."""


def named_options(text: str, options: Sequence[str]) -> set[str]:
    """The letters of the options that `text` names, including denied ones."""
    return {letter for letter, _, _ in _mentions(text, options)}


def mask_options(text: str, options: Sequence[str], mask: str = "[option]") -> str:
    """Replace every mention of an option in `text`, so that only the template of it remains."""
    masked = ""
    last_end = 0
    for _, start, end in _mentions(text, options):
        masked += text[last_end:start] + mask
        last_end = end
    return masked + text[last_end:]


def conclusion(think: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reasoning concludes, or None.

    If words such as "therefore" or "the answer" introduce an option anywhere, this is the option in
    the last such sentence; otherwise, the option in the last sentence that asserts one. None if
    that sentence asserts several.
    """
    think = think[-LONGEST_REASONING:]
    asserted: list[Mention] = []
    concluded: list[Mention] = []
    for letter, start, end in _mentions(think, options):
        before = _SENTENCE.split(think[max(0, start - _NEAR) : start])[-1]
        # A cue before the last turn refers to something else.
        if _DENIED_BEFORE.search(_TURN.split(before)[-1]):
            continue
        if _DENIED_AFTER.match(think[end : end + _NEAR]):
            continue
        # Include the mention itself: "the answer is B" is one.
        introduced = _CONCLUDED.search(before + think[start:end])
        (concluded if introduced else asserted).append((letter, start, end))

    letters: set[str] = set()
    last_end = 0
    for letter, start, end in concluded or asserted:
        if _SENTENCE.search(think, last_end, start):
            letters.clear()  # only the last sentence counts
        letters.add(letter)
        last_end = end
    return letters.pop() if len(letters) == 1 else None


def _mentions(text: str, options: Sequence[str]) -> Iterator[Mention]:
    pattern, letters = _pattern(tuple(options))
    for match in pattern.finditer(text):
        group = match.lastindex or 0  # never 0: each alternative is a group
        letter = letters[group] or match[group]
        if letter in LETTERS[: len(options)]:
            yield letter, match.start(), match.end()


@lru_cache(maxsize=1024)  # many completions share a question's options
def _pattern(options: tuple[str, ...]) -> tuple[re.Pattern[str], list[str]]:
    """A pattern that matches every name of an option, and the letter of each of its groups; "" for
    a group that captures the letter itself.
    """
    letters: dict[str, str] = {}
    for names in zip(*map(_names, options), strict=True):
        for letter, name in zip(LETTERS, names, strict=False):
            # A name shared by two options names neither. Full texts come before abbreviations.
            letters.setdefault(name, letter if names.count(name) == 1 else "")
    unique = [name for name in letters if name and letters[name]]
    unique.sort(key=len, reverse=True)  # a longer name may contain a shorter one
    patterns = [rf"(?i:(?<![^\W_])({name})(?![^\W_]))" for name in unique]
    # Groups count from 1, and _LETTER has two.
    letter_of_group = ["", "", "", *(letters[name] for name in unique)]
    return re.compile("|".join([_LETTER, *patterns])), letter_of_group


def _names(option: str) -> tuple[str, str, str]:
    """Patterns of an option's three names: its full text, its text without lead and remarks, and a
    one-word remark. "" for a name that the option lacks.
    """
    text = re.split(r"(?<=\w\w[.!?])\s", option.strip().lower())[0]
    bare = _LEAD.sub("", _REMARK.sub(" ", text))
    remark = _ONE_WORD_REMARK.search(text)
    return _spelled(text), _spelled(bare), _spelled(remark[1] if remark else "")


def _spelled(name: str) -> str:
    """A pattern of a name's words in sequence, the last in singular or plural; "" for no words."""
    words = _WORDS.findall(name)
    if words in (["yes"], ["no"]):  # these count only as a clause of their own
        return words[0] + r"(?=[.,;!]|\Z)"
    if not words or re.fullmatch("[a-z]", "".join(words)):
        return ""  # a single letter is too common in any text
    # Words contain no special characters of patterns.
    stem = re.sub(r"(?<=\w\w)ies\Z", "y", words.pop())
    stem = re.sub(r"(?<=\w\w\w)(?<![sui])s\Z", "", stem)  # not "abscess", "uterus", "pelvis"
    plural = re.sub(r"(?<=\w\w)y\Z", "(?:y|ies|ys)", stem)
    if plural == stem:
        plural += "(?:e?s)?"
    return _GAP.join([*words, plural])
