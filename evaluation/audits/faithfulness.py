"""Audit the reasoning of completions by their text alone: could it have led to the answer?

    python -m evaluation.audits.faithfulness FILE

A right letter after a fluent think block does not show how the model arrived at it. Turpin et al.
2023 (arXiv 2305.04388) found chains of thought that never mention what decided the answer; Lanham
et al. 2023 (arXiv 2307.13702) call reasoning post hoc if the answer does not depend on it;
MedVLM-R1 (arXiv 2502.19634) itself reports that some of its reasoning is superficial. Their tests
query the model again. These audits only read its text, so they can find reasoning that can't have
led to the answer, but never prove that any did.

The checks (`evaluation.audits.conclusion` defines when a text names or concludes an option):

- *has reasoning*: there is a think block that is not blank;
- *names an option*: the reasoning names an option, even if only to deny it;
- *conclusion agrees*, *conclusion conflicts*, *no conclusion*: the option that the reasoning
  concludes, compared with the answer's letter; the last if either is missing. The three add up to
  all completions;
- *right without naming an option*: of the completions that name no option, those with the right
  letter: the text does not show what decided;
- *shares a template*: of the reasonings, those repeated by another question's reasoning once the
  texts and letters of the options are masked: exactly, or with a Jaccard similarity of word
  trigrams of at least 0.9 (Broder 1997). In such a text, only the option itself can come from the
  image;
- *largest template*: of the reasonings, those with the most common template.
"""

import argparse
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import printable
from common.program import run_program
from rewards import read_letter, think_text
from rewards.letter import excerpt, visible

from ..statistics import grouped, percent, wilson
from .completions import Completion, read_completions
from .conclusion import conclusion, mask_options, named_options

MASK = "[option]"
_TOKEN = re.compile(rf"{re.escape(MASK)}|[^\W_]+")
_MOST_COLUMNS = 4  # modalities that fit in 120 characters, beside the column for all
MEANINGS = {
    "has reasoning": "There is a think block that is not blank.",
    "names an option": "The reasoning names an option, even if only to deny it.",
    "conclusion agrees": "The reasoning concludes the option that the model answers.",
    "conclusion conflicts": "The reasoning concludes a different option from the answer.",
    "no conclusion": "The reasoning concludes no single option, or the answer has no letter:"
    " nothing to compare.",
    "right without naming an option": "Of the completions that name no option, those with the right"
    " letter: the text does not show what decided.",
    "shares a template": "Another question has the same reasoning once the options are masked;"
    " {distinct} distinct templates.",
    "largest template": "The most common reasoning: {largest}",
}

FLAGS = ("no reasoning", "names no option", "conclusion conflicts", "shares a template")
"""Problems that a completion can have."""

Words = tuple[str, ...]
Trigrams = frozenset[Words]
Row = dict[str, Any]


class Reading(NamedTuple):
    """What the text of a completion shows.

    Attributes:
        id: of its question.
        words: of its reasoning, with the options masked.
        checks: the names of the checks that hold, from `MEANINGS` and `FLAGS`.
    """

    id: str
    words: Words
    checks: set[str]


def read(completion: Completion) -> Reading:
    """Check one completion by itself; `read_all` finds shared templates."""
    think = think_text(completion.completion)
    answer = read_letter(completion.completion)
    if think is None or not visible(think):
        think = ""  # names and concludes nothing
    named = bool(named_options(think, completion.options))
    concluded = conclusion(think, completion.options)
    compared = concluded is not None and answer is not None
    checks = {
        "has reasoning": think != "",
        "no reasoning": think == "",
        "names an option": named,
        "names no option": think != "" and not named,
        "right without naming an option": answer == completion.ground_truth and not named,
        "conclusion agrees": compared and concluded == answer,
        "conclusion conflicts": compared and concluded != answer,
        "no conclusion": not compared,
    }
    # The spaces keep the mask apart from its neighbours. Mask before lower(): only a capital can be
    # an option's letter.
    masked = mask_options(think, completion.options, f" {MASK} ")
    words = tuple(_TOKEN.findall(masked.lower()))
    return Reading(completion.id, words, {check for check, holds in checks.items() if holds})


def read_all(completions: Sequence[Completion]) -> tuple[list[Reading], list[list[Reading]]]:
    """Check all completions of one model. Returns their readings, and the readings grouped by
    template.
    """
    readings = list(map(read, completions))
    reasoned = [reading for reading in readings if "has reasoning" in reading.checks]
    numbers = templates([reading.words for reading in reasoned])
    groups = list(grouped(numbers, reasoned).values())
    for group in groups:
        # Count questions: the samples of one question, at any step of a run, may well be alike.
        if len({reading.id for reading in group}) > 1:
            for reading in group:
                reading.checks.add("shares a template")
    return readings, groups


def templates(reasonings: Sequence[Words]) -> list[int]:
    """The template number of each reasoning; equal texts and near-duplicates share a number.

    Distinct texts are taken from the shortest to the longest. Each joins the first template whose
    first text has a Jaccard similarity of word trigrams of 0.9 or more with it, or starts a new
    template. This is exact. It is fast because two such sets, with the rarest trigrams first, must
    share one within the first 1/10 of each plus one (prefix filtering, Xiao et al. 2008, WWW,
    section 3).
    """
    trigrams = [_trigrams(words) for words in reasonings]
    number_of = dict.fromkeys(trigrams, 0)  # unlike a set, it keeps their order
    frequency = Counter(chain.from_iterable(number_of))
    firsts: list[Trigrams] = []  # of each template's first text
    holders: defaultdict[Words, list[int]] = defaultdict(list)
    for own in sorted(number_of, key=len):
        # Sorted twice: equally frequent trigrams must have the same order in all texts.
        ranked = sorted(sorted(own), key=frequency.__getitem__)
        rarest = ranked[: len(own) // 10 + 1]  # a shorter prefix would miss near-duplicates
        candidates = set(chain.from_iterable(holders[trigram] for trigram in rarest))
        alike = [number for number in candidates if _alike(own, firsts[number])]
        number_of[own] = min(alike, default=len(firsts))
        if not alike:
            firsts.append(own)
            for trigram in rarest:
                holders[trigram].append(number_of[own])
    return [number_of[own] for own in trigrams]


def _trigrams(words: Words) -> Trigrams:
    """The runs of three words; a shorter text is a single run."""
    return frozenset(words[i : i + 3] for i in range(max(1, len(words) - 2)))


def _alike(one: Trigrams, other: Trigrams) -> bool:
    # |A and B| / |A or B| >= 9/10, in integers and without the union.
    return 19 * len(one & other) >= 9 * (len(one) + len(other))


def audit(completions: Sequence[Completion]) -> list[Row]:
    """Check the completions (at least one) of one model.

    Returns:
        Rows {"model", "check", "count", "of", "rate", "low", "high", "meaning"}: `count` of `of`
        completions, the rate with its 95 % Wilson interval, and what the check means. A check whose
        `of` is 0 has no row.
    """
    readings, groups = read_all(completions)
    counts = Counter(chain.from_iterable(reading.checks for reading in readings))
    largest = max(groups, key=len, default=[])
    example = " ".join(largest[0].words) if largest else ""
    counts["largest template"] = len(largest)
    of = dict.fromkeys(MEANINGS, len(readings))  # except for three:
    of["right without naming an option"] -= counts["names an option"]
    of["shares a template"] = of["largest template"] = counts["has reasoning"]
    rows = []
    for check, meaning in MEANINGS.items():
        if n := of[check]:
            meaning = meaning.format(distinct=len(groups), largest=excerpt(example, 160))
            rows.append(check_row(completions[0].model, check, counts[check], n, meaning))
    return rows


def check_row(model: str, check: str, count: int, of: int, meaning: str) -> Row:
    """A row of `audit`: `count` of `of` (at least 1), with the rate's 95 % Wilson interval."""
    low, high = wilson(count, of)
    return {
        "model": model, "check": check, "count": count, "of": of, "rate": count / of,
        "low": low, "high": high, "meaning": meaning,
    }  # fmt: skip


def flags(completions: Sequence[Completion]) -> list[list[str]]:
    """The problems of each completion of one model, in order: names from `FLAGS`."""
    readings, _ = read_all(completions)
    return [[flag for flag in FLAGS if flag in reading.checks] for reading in readings]


def table(completions: Sequence[Completion]) -> str:
    """The checks as text: a block for each model, with a column for all completions and, if they
    fit, one for each modality.
    """
    by_model = grouped((completion.model for completion in completions), completions)
    return "\n\n".join(map(_block, by_model.values()))


def _block(completions: Sequence[Completion]) -> str:
    columns = grouped((completion.modality for completion in completions), completions)
    # A single modality would repeat the column for all.
    if not 1 < len(columns) <= _MOST_COLUMNS:
        columns = {}
    rates = [{row["check"]: _rate(row) for row in audit(own)} for own in columns.values()]
    heads = [printable(name)[:14] for name in columns]
    line = "{:32}{:>31}" + "{:>15}" * len(columns)
    lines = [printable(completions[0].model)[:119], line.format("", "all, 95 % interval", *heads)]
    explanations = []
    for row in audit(completions):
        check = row["check"]
        interval = f"({percent(row['low'])} to {percent(row['high'])})"
        cells = [of_modality.get(check, "-") for of_modality in rates]
        lines.append(line.format(check, f"{_rate(row):<16}{interval:>15}", *cells))
        if "template" in check:  # the other meanings are the same for every file
            explanations.append(textwrap.fill(row["meaning"], 120))
    return "\n".join(lines + explanations)


def _rate(row: Row) -> str:
    return f"{percent(row['rate']):>5} % of {row['of']}"


def main() -> int:
    return run_program("faithfulness", _print_table)


def _print_table() -> None:
    parser = argparse.ArgumentParser("faithfulness", description=__doc__.split("\n")[0])
    parser.add_argument(
        "completions", type=Path, help="JSON lines with id, model, question, options, ..."
    )
    completions, skipped = read_completions(parser.parse_args().completions)
    print(table(completions))
    print(
        f"\n{len(completions)} completions read, {skipped} skipped "
        "(no options, or a ground truth that is not a letter)"
    )


if __name__ == "__main__":
    sys.exit(main())
