"""Reading the option letter out of an answer: one parser for the accuracy reward and for
evaluation.

The published MedVLM-R1 code upper-cases the answer and counts the characters A-J in it, so that
every "b" or "e" of a word is a letter: "B, there is no clear ..." and "B) Heart" score nothing,
while a lone "mass" is an A. Here a letter counts only where a reader would take it for the choice:

- alone, in either case ("B", "b"): *exact*;
- opening the answer or a line ("B)", "B. Heart", "(b)", "**B**", "B, there is ...", "B Heart", "B
  is correct");
- after a word that announces it ("Answer: B", "The answer is B", "Option B", "it could be B",
  "答案是B");
- between punctuation ("Heart (B)", "Heart. B"), or listed beside such a letter ("A or B", "A, B",
  "A/B");
- never as an article or pronoun ("A mass", "A Heart", "I think"), inside a word ("CT", "B-cell"),
  or as part of a name ("hepatitis B", "vitamin D", "B lymphocytes", "E. coli").

Two different choices are ambiguous, and so is a choice beside another label ("A. Heart B. Lung"):
no letter. A letter that is denied ("not A", "A is wrong") is not chosen: "not A but B" and "B, not
A" choose B. In doubt, no letter. Full-width, circled and styled letters are folded (Unicode NFKC);
look-alikes of other scripts are not letters.
"""

import re
import unicodedata
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJ"  # the published code's ten options
LONGEST_ANSWER = 1000  # characters; bounds the work that a hostile completion can cause

# Control characters, zero-width and other blank ones that str.strip() leaves.
_INVISIBLE = (
    r"\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u034f\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
)
INVISIBLE = re.compile(rf"[{_INVISIBLE}]+")
VISIBLE = re.compile(rf"[^\s{_INVISIBLE}]")

# Latin, Greek, Cyrillic and combining marks; not CJK, which is written without spaces around a
# letter.
_WORD = r"0-9A-Za-z\u00c0-\u024f\u0300-\u04ff"
_TAG = re.compile(r"</?(?:(?i:think|answer)|b|i|u|p|br|em|strong)\s*/?>", re.ASCII)
_MARKED = re.compile(
    r"[*_`\"“{$>]\s?([A-Ja-j])\s?[*_`\"”}$<]"
)  # "**A** Heart": set apart, so it is no article
_MARKUP = re.compile(
    r"\\(?:boxed|fbox|text[a-z]*|math[a-z]*)|\\[()\[\]]|[*_`$#{}<>\"“”«»|~]"
    rf"|(?<![{_WORD}])['‘’]|['‘’](?![{_WORD}])"
)
# A letter that stands alone: not "B-cell", "patient's", "I'm", "e.g.", "T2".
_ALONE = re.compile(
    rf"(?<![{_WORD}])(?<![{_WORD}][-‐'’.])([A-Ja-j])"
    rf"(?![{_WORD}]|[-‐'’][{_WORD}]|\.[{_WORD}](?![{_WORD}]))"
)

# After a letter that is a choice: the end or punctuation; after a capital also a bracket, a verb, a
# further letter.
_I_END = re.compile(r"\s*(?:\Z|[)\]:]|\.(?!\d))")
_END = re.compile(
    r"\s*(?:\Z|[)\]:,;!?。、=]|\.(?!\d)|[ \t]-\s?|\n)|-\s"
    rf"|\s*[–—/&+](?![A-Z](?![{_WORD}]))|\s*[/&+]\s*[A-J](?![{_WORD}])"
)  # "A/B", but not "A/P view"
_CAPITAL_END = re.compile(
    rf"\s*[(\[]|\s+(?:not\s+)?[A-J](?![{_WORD}'’‐-])|是|为|选项|项|\s+(?:is|was|are|because|as|since|due|or|and|vs|versus"
    r"|but|seems|appears|looks|would|could|should|may|might|must|can|cannot|can't|isn't)\b"
)
_NAME = re.compile(
    r"\s+(?:cells?|lymphocytes?|lines?|symptoms|section|dimers?|wires?)\b"
    r"|\.?\s+(?:coli|pylori|difficile|aureus)\b"
)
_LABEL = re.compile(r"\s?[.:)]\s+\S")

# Before a letter that is a choice: another letter, a word that announces it, or a pause.
_LIST = re.compile(r"[ \t()\[\],/&+、–—-]*(?:\b(?:and|or|vs|versus|nor)\b|或|和|与)?[ \t(\[]*")
_NAMED = re.compile(r"\b(?:option|choice|letter)s?[\s:=([-]*\Z", re.IGNORECASE)
_CUE = re.compile(
    r"(?:\b(?:answers?|choose|chose|select|selected|pick|is|be|it's|are|either|both|between|maybe|perhaps"
    r"|possibly|probably|likely|with|think|believe|say)|答案|选项|选择|选|是|为|[:=])[\s:=([-]*\Z",
    re.IGNORECASE,
)
_PAUSE = re.compile(
    r"(?:[.;,!?。、–—/&+()\[\]]|\s-|\b(?:or|and|but|so|thus|hence|therefore|also|alternatively)|或|和)"
    r"[\s(\[]*\Z",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|cannot|neither|nor|than|except|excluding|exclude|eliminate|rule|ruled|instead of"
    r"|(?:all|anything|everything) but)\s+|n't\s+|不是|不选|排除|而非)"
    r"(?:(?:the|out|be|is|in|likely|correct|answer|option|choice|letter|choose|select|pick)\s+){0,4}[(\[]*\s*\Z",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    rf"(?:,?(?: and| or)? [A-HJ](?![{_WORD}])){{0,9}}"  # "A, C and D are wrong" denies all three
    r"[)\]]?\s*(?:\s(?:is|was|are|seems|appears|can|could|would|may|must)\s+"
    r"(?:(?:the|an|a|also|be|clearly|definitely|probably|most)\s+){0,3}"
    r"(?:not|wrong|incorrect|false|excluded|eliminated|unlikely|ruled)\b|\s(?:isn't|wasn't|cannot|can't)\b|不是|不对|错)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Parsed:
    """What an answer chooses: `letter` is None if nothing or nothing clear; `exact` if it is that
    letter alone.
    """

    letter: str | None
    exact: bool
    why: str


def parse_letter(text: str) -> Parsed:
    """The option letter (A-J) that `text`, the inside of an answer, chooses; see the module for
    what counts.

    A strict reader takes `letter` only if `exact`, a lenient one always. A text of more than
    `LONGEST_ANSWER` characters chooses nothing. Never raises; the time is bounded whatever the
    text.
    """
    text = unicodedata.normalize("NFKC", text.strip()[: LONGEST_ANSWER + 1])
    if len(text) > LONGEST_ANSWER:
        return Parsed(None, False, f"the answer has more than {LONGEST_ANSWER} characters")
    text = INVISIBLE.sub("", text).strip()
    if not text:
        return Parsed(None, False, "the answer is empty")
    if text.upper() in LETTERS and len(text) == 1:
        return Parsed(text.upper(), True, f"the answer is exactly {text.upper()}")
    chosen, denied, labels = _roles(_plain(text))
    if not chosen:
        return Parsed(
            None,
            False,
            f"the answer {excerpt(text)} denies {_join(denied)} and chooses no letter"
            if denied
            else f"the answer {excerpt(text)} chooses no option letter",
        )
    if len(chosen | labels) > 1:
        return Parsed(
            None, False, f"the answer {excerpt(text)} is ambiguous: {_join(chosen | labels)}"
        )
    if chosen & denied:
        return Parsed(
            None, False, f"the answer {excerpt(text)} both chooses and denies {_join(chosen)}"
        )
    letter = chosen.pop()
    return Parsed(
        letter, False, f"the answer chooses {letter} with something added: {excerpt(text)}"
    )


def excerpt(text: str, longest: int = 40) -> str:
    """The beginning of `text`, quoted, with every unprintable character escaped: safe to print on a
    terminal.
    """
    return repr(text) if len(text) <= longest else repr(text[:longest]) + "..."


def _join(letters: set[str]) -> str:
    return " and ".join(sorted(letters))


def _plain(text: str) -> str:
    """`text` without mark-up and with every run of white space one blank or one line end, so that
    no pattern below meets a long run of what it may repeat.
    """
    text = _MARKUP.sub(" ", _TAG.sub("\n", _MARKED.sub(_bracketed, text))).replace("’", "'")
    text = re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", text)
    return re.sub(r"([.,:;!?()\[\]、–—/&+=-])\1+", r"\1", text.strip())


def _bracketed(marked: re.Match[str]) -> str:
    return f"{marked[0][0]} ({marked[1]}) {marked[0][-1]}"


def _roles(text: str) -> tuple[set[str], set[str], set[str]]:
    """The letters that `text` chooses, those that it denies, and those that stand before a further
    option.
    """
    letters: dict[str, set[str]] = {
        "chosen": set(),
        "denied": set(),
        "label": set(),
        "prose": set(),
    }
    role, end = "prose", 0
    for match in _ALONE.finditer(text):
        listed = end > 0 and _LIST.fullmatch(text, end, match.start()) is not None
        role, end = _role(text, match, role if listed else None), match.end()
        letters[role].add(match[1].upper())
    return letters["chosen"], letters["denied"], letters["label"]


def _role(text: str, match: re.Match[str], listed_with: str | None) -> str:
    """One lone letter's role, from what stands around it and from the role of the letter it is
    listed with, if any.
    """
    letter, after = match[1], match.end()
    if _NAME.match(text, after) or letter in "Ii" and not _I_END.match(text, after):
        return "prose"
    before = text[max(0, match.start() - 60) : match.start()]
    if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(text, after):
        return "denied"
    named = _NAMED.search(before) is not None
    closed, free = _closed(text, after, letter), letter in "BCDEFGHJ"
    if listed_with is not None:
        return listed_with if closed or free else "prose"
    opens = not before.rpartition("\n")[2].strip(" \t-•([") and (
        match.start() < 60 or "\n" in before
    )
    if closed and (opens or named or _CUE.search(before) or _PAUSE.search(before)):
        return "chosen"
    if free and (opens or _CUE.search(before)) or named and letter.isupper():
        return "chosen"
    return "label" if _LABEL.match(text, after) else "prose"


def _closed(text: str, after: int, letter: str) -> bool:
    """Whether what follows the letter shows that it is no article or pronoun."""
    return (
        _END.match(text, after) is not None
        or letter.isupper()
        and _CAPITAL_END.match(text, after) is not None
    )
