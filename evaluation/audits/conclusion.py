"""Does the reasoning come to the answer that is given? Read from the text alone, by rules that can
say why.

An option is named by its text as whole words ("the knee", "kidneys" for "Kidney") or by its letter
announced as such ("option B", "the answer is B", "B)", but not the article "A"). Of an option these
do not count: case, punctuation, an article or "No, it's" before it, a remark in parentheses (but a
single word there, "(MRI)", is a second name), and what follows its first sentence. A text that says
"no mass" names the option "no mass" and not the option "mass".

A naming that is denied or merely considered is no conclusion. As in NegEx (Chapman et al. 2001, J
Biomed Inform 34:301) a cue ("no signs of", "rather than", "used to diagnose") covers what follows
it in its sentence up to a turn ("but", ", which"), and some ("is ruled out") cover what stands
before them. Prose says more than such rules can read: the verdicts are for rates over many
completions.

Time is linear in the completion's length, whatever the text.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from rewards.letter import LETTERS, VISIBLE
from rewards.rules import Verdict, read_letter, think_text

LONGEST_REASONING = 100_000  # characters, of which the last are searched for a conclusion
_NEAR = 200  # characters around a naming that are searched for cues; bounds the work
_WORDS = re.compile(r"[^\W_]+")
_REMARK = re.compile(r"\([^()]*\)")
_GAP = r"[\W_]{1,4}"
_LETTER = (
    r"\b(?i:option|choice|letter|answer)(?i:\s(?:is|should be|would be|must be))?[\s:*(\[]{0,4}"
    r"([A-J])(?![\w'’-])|(?<![\w'’-])([A-J])\)"
)
_LEAD = re.compile(
    r"\s*(?:(?:yes|no)[,.;:]\s*)?(?:(?:it['’]s|it is|it shows|this is|there is)\s)?(?:(?:an?|the)\s)?",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?](?=\s|\Z)|\n")
_TURN = re.compile(
    r"[;:]|\b(?:but|however|although|though|while|whereas|therefore|thus|hence|because|since|shows|suggests|indicates"
    r"|reveals|appears|(?<!not )(?<!n't )(?<!would )(?<!that )(?:suggest|indicate))\b"
    r"|(?:,|\band) (?:the|there|it|this|these|we|so|which|suggesting|indicating|consistent)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:no|non|not(?! only)|cannot|without|neither|nor|never|than|instead of|unlike|except|exclud\w+|rul\w+ out"
    r"|absence of|lack of|free of|used (?:to|(?:for|in) \w+ing)|(?:for|in|to) diagnos\w+"
    r"|(?:determine|assess|check|see) (?:if|whether))\b|n['’]t\b",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"(?:,?\s[^\W_]+){0,3}?\s(?:(?:is|are|was|were|can be|has been)\s(?:not|absent|excluded|unlikely|ruled out|wrong"
    r"|incorrect)|(?:is|are|was|were|does|do|ca)n['’]t|(?:does|do|can) not|cannot)\b"
    r"|[^.!?\n]{0,80}?\bwhich (?:is|are) not (?:visible|seen|present)\b",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"\b(?:therefore|thus|hence|consequently|in conclusion|conclude|answer|(?:correct|best|right) (?:option|choice))\b",
    re.IGNORECASE,
)


class _Naming(NamedTuple):
    letter: str
    start: int
    end: int


def named_options(text: str, options: Sequence[str]) -> list[str]:
    """The letters of the options that `text` names, denied ones too, in the order of their last
    naming.
    """
    letters: dict[str, None] = {}
    for naming in _namings(text, options):
        letters.pop(naming.letter, None)
        letters[naming.letter] = None
    return list(letters)


def mask_options(text: str, options: Sequence[str], mask: str = "[option]") -> str:
    """`text` with every naming of an option replaced: what is left of a reasoning when its subject
    is taken out.
    """
    kept, end = [], 0
    for naming in _namings(text, options):
        kept += text[end : naming.start], mask
        end = naming.end
    return "".join([*kept, text[end:]])


def conclusion(think: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reasoning comes to, or None.

    That is what its last sentence asserts that asserts any; or, if words such as "therefore" or
    "the answer" introduce an option anywhere, the last that they introduce. None if that sentence
    asserts several options.
    """
    think = think[-LONGEST_REASONING:]
    said: dict[bool, set[str]] = {False: set(), True: set()}
    last = {False: 0, True: 0}
    for naming in _namings(think, options):
        before = _SENTENCE.split(think[max(0, naming.start - _NEAR) : naming.start])[-1]
        if _denied(before, think[naming.end : naming.end + _NEAR]):
            continue
        concluded = _CONCLUDED.search(before + think[naming.start : naming.end]) is not None
        if _SENTENCE.search(think, last[concluded], naming.start):
            said[concluded].clear()
        said[concluded].add(naming.letter)
        last[concluded] = naming.end
    letters = said[True] or said[False]
    return letters.pop() if len(letters) == 1 else None


def consistency_reward(completion: str, options: Sequence[str]) -> float:
    """1 if the think block concludes the option whose letter the completion answers, otherwise
    0.
    """
    return judge_consistency(completion, options).score


def judge_consistency(completion: str, options: Sequence[str]) -> Verdict:
    """The consistency rule; see `consistency_reward`. It does not ask whether that option is
    right.
    """
    think, answer = think_text(completion), read_letter(completion)
    if think is None:
        return Verdict("consistency", 0.0, "no <think>...</think> block")
    if not VISIBLE.search(think):
        return Verdict("consistency", 0.0, "the think block is empty")
    concluded = conclusion(think, options)
    if concluded is None:
        named = " and ".join(sorted(named_options(think, options)))
        names = f"{named} but concludes no single option" if named else "no option"
        return Verdict("consistency", 0.0, f"the reasoning names {names}")
    if answer is None:
        return Verdict(
            "consistency",
            0.0,
            f"the reasoning concludes {concluded}, the answer chooses no option letter",
        )
    if answer != concluded:
        return Verdict(
            "consistency", 0.0, f"the reasoning concludes {concluded}, the answer is {answer}"
        )
    return Verdict("consistency", 1.0, f"the reasoning concludes {concluded}, as the answer does")


def _denied(before: str, after: str) -> bool:
    return (
        _DENIED.search(_TURN.split(before)[-1]) is not None
        or _DENIED_AFTER.match(after) is not None
    )


def _namings(text: str, options: Sequence[str]) -> Iterator[_Naming]:
    pattern, letters = _pattern(tuple(options))
    for match in pattern.finditer(text):
        letter = letters[match.lastindex - 1] or match[match.lastindex]
        if letter in LETTERS[: len(options)]:
            yield _Naming(letter, *match.span())


@lru_cache(maxsize=1024)
def _pattern(options: tuple[str, ...]) -> tuple[re.Pattern[str], list[str]]:
    """What names an option, and the letter of each group; "" for a group that holds the letter
    itself.
    """
    names: dict[str, str] = {}
    for level in zip(*map(_names, options)):
        often = Counter(level)
        for letter, name in zip(LETTERS, level):
            names.setdefault(
                name, letter if often[name] == 1 else ""
            )  # a name of two options tells neither
    found = sorted(
        ((name, letter) for name, letter in names.items() if name and letter),
        key=lambda n: -len(n[0]),
    )
    texts = (
        rf"(?i:(?<![^\W_])({name})(?![^\W_]))" for name, _ in found
    )  # the longest first: it may hold others
    return re.compile("|".join([_LETTER, *texts])), ["", "", *(letter for _, letter in found)]


def _names(option: str) -> tuple[str, str, str]:
    """The patterns that name an option: its whole text, that without lead and remarks, a remark of
    one word.
    """
    text = re.split(r"(?<=\w\w[.!?])\s", option.strip())[0]
    bare = _REMARK.sub(" ", text)
    singles = [words for words in map(_WORDS.findall, _REMARK.findall(text)) if len(words) == 1]
    return (
        _spelled(_WORDS.findall(text)),
        _spelled(_WORDS.findall(bare, _LEAD.match(bare).end())),
        _spelled(singles[0] if singles else []),
    )


def _spelled(words: Sequence[str]) -> str:
    """Words in a row, the last in singular or plural. "" for none and for a lone letter, which is
    one in any text; a bare "yes" or "no" counts only where it stands for a clause.
    """
    *first, last = [word.lower() for word in words] or [""]
    if not first and (
        len(last) < 2 and last.isascii() and not last.isdigit() or last in ("yes", "no")
    ):
        return last + r"(?=[.,;!]|\Z)" if len(last) > 1 else ""
    stem = re.sub(r"(?<=\w\w\w)(?<![sui])s\Z", "", re.sub(r"(?<=\w\w)ies\Z", "y", last))
    plural = (
        re.escape(stem[:-1]) + "(?:y|ies|ys)"
        if stem[2:].endswith("y")
        else re.escape(stem) + "(?:e?s)?"
    )
    return _GAP.join([*map(re.escape, first), plural])
