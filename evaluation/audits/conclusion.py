"""The option that a reasoning comes to, read from its text alone, by rules that can say why.

An option is named by its text as whole words ("the knee", "kidneys" for "Kidney") or by its letter
announced as such ("option B", "the answer is B", "B)", but not the article "A"). Of an option these
do not count: case, punctuation, an article or "No, it's" before it, a remark in parentheses (but a
single word there, "(MRI)", is a second name), and what follows its first sentence. A text that says
"no mass" names the option "no mass" and not the option "mass".

A naming that is denied or merely considered is no conclusion. As in NegEx (Chapman et al. 2001, J
Biomed Inform 34:301) a cue ("no signs of", "rather than", "used to diagnose") covers what follows
it in its sentence up to a turn ("but", ", which"), and some ("is ruled out") cover what stands
before them. Prose says more than such rules can read: the conclusions are for rates over many
completions.

Time is linear in the text's length, whatever the text.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from rewards import LETTERS

LONGEST_REASONING = 100_000  # characters, of which the last are searched for a conclusion
_NEAR = 200  # characters around a naming that are searched for cues; bounds the work

# How an option is named
_GAP = r"[\W_]{1,4}"  # between a name's words; bounded, or a run of blanks would cost its square
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

# What becomes of a naming in its sentence
_SENTENCE = re.compile(r"[.!?](?=\s|\Z)|\n")
_TURN = re.compile(
    r"[;:]|\b(?:but|however|although|though|while|whereas|therefore|thus|hence|because|since"
    r"|shows|suggests|indicates|reveals|appears"
    # the plural states a finding too, unless it is "does not suggest", "that would suggest"
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

Naming = tuple[str, int, int]
"""An option's letter, and where in the text its name begins and ends."""


def named_options(text: str, options: Sequence[str]) -> set[str]:
    """The letters of the options that `text` names, denied ones too."""
    return {letter for letter, _, _ in _namings(text, options)}


def mask_options(text: str, options: Sequence[str], mask: str = "[option]") -> str:
    """`text` with every naming of an option replaced: what is left of a reasoning when its subject
    is taken out.
    """
    masked = ""
    last_end = 0
    for _, start, end in _namings(text, options):
        masked += text[last_end:start] + mask
        last_end = end
    return masked + text[last_end:]


def conclusion(think: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reasoning comes to, or None.

    That is what its last sentence asserts that asserts any; or, if words such as "therefore" or
    "the answer" introduce an option anywhere, the last that they introduce. None if that sentence
    asserts several options.
    """
    think = think[-LONGEST_REASONING:]
    asserted: list[Naming] = []
    concluded: list[Naming] = []
    for letter, start, end in _namings(think, options):
        before = _SENTENCE.split(think[max(0, start - _NEAR) : start])[-1]
        # A cue before the last turn is about something else.
        if _DENIED_BEFORE.search(_TURN.split(before)[-1]):
            continue
        if _DENIED_AFTER.match(think[end : end + _NEAR]):
            continue
        # With the name itself, for "the answer is B" is one.
        introduced = _CONCLUDED.search(before + think[start:end])
        (concluded if introduced else asserted).append((letter, start, end))

    letters: set[str] = set()
    last_end = 0
    for letter, start, end in concluded or asserted:
        if _SENTENCE.search(think, last_end, start):
            letters.clear()  # a new sentence: it alone counts
        letters.add(letter)
        last_end = end
    return letters.pop() if len(letters) == 1 else None


def _namings(text: str, options: Sequence[str]) -> Iterator[Naming]:
    pattern, letters = _pattern(tuple(options))
    for match in pattern.finditer(text):
        group = match.lastindex or 0  # never 0: each alternative is a group
        letter = letters[group] or match[group]
        if letter in LETTERS[: len(options)]:
            yield letter, match.start(), match.end()


@lru_cache(maxsize=1024)  # each question's options come with many completions
def _pattern(options: tuple[str, ...]) -> tuple[re.Pattern[str], list[str]]:
    """A pattern of all that names an option, and the letter of each of its groups; "" for a group
    that holds the letter itself.
    """
    letters: dict[str, str] = {}
    for names in zip(*map(_names, options), strict=True):
        for letter, name in zip(LETTERS, names, strict=False):
            # A name that two options share names neither. Whole texts come before abbreviations.
            letters.setdefault(name, letter if names.count(name) == 1 else "")
    naming = [name for name in letters if name and letters[name]]
    naming.sort(key=len, reverse=True)  # a longer name may hold a shorter one
    patterns = [rf"(?i:(?<![^\W_])({name})(?![^\W_]))" for name in naming]
    # Groups count from 1, and _LETTER has two.
    letter_of_group = ["", "", "", *(letters[name] for name in naming)]
    return re.compile("|".join([_LETTER, *patterns])), letter_of_group


def _names(option: str) -> tuple[str, str, str]:
    """The patterns of an option's three names: its whole text, its text without lead and remarks,
    and a remark of one word. A name that the option lacks is "".
    """
    text = re.split(r"(?<=\w\w[.!?])\s", option.strip().lower())[0]
    bare = _LEAD.sub("", _REMARK.sub(" ", text))
    remark = _ONE_WORD_REMARK.search(text)
    return _spelled(text), _spelled(bare), _spelled(remark[1] if remark else "")


def _spelled(name: str) -> str:
    """The pattern of a name's words in a row, the last in singular or plural; "" for no name."""
    words = _WORDS.findall(name)
    if words in (["yes"], ["no"]):  # these count only where they stand for a clause
        return words[0] + r"(?=[.,;!]|\Z)"
    if not words or re.fullmatch("[a-z]", "".join(words)):
        return ""  # a lone letter is one in any text
    # Words have no character that means more than itself in a pattern.
    stem = re.sub(r"(?<=\w\w)ies\Z", "y", words.pop())
    stem = re.sub(r"(?<=\w\w\w)(?<![sui])s\Z", "", stem)  # not "abscess", "uterus", "pelvis"
    plural = re.sub(r"(?<=\w\w)y\Z", "(?:y|ies|ys)", stem)
    if plural == stem:
        plural += "(?:e?s)?"
    return _GAP.join([*words, plural])
