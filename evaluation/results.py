"""From the rows of an evaluation to its numbers: accuracy, paired tests, probes, and the flags of
single cases.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import fmean, multimode

from data import Question

from .accuracy import tally
from .audits.blind import Credits, blind_credits, by_modality
from .audits.completions import Completion
from .audits.faithfulness import audit, check_row, flags
from .probes import KEPT, NO_IMAGE, NONE, REASONING, ROTATED, SWAPPED, WHOLE
from .records import Row, Rows
from .statistics import grouped, mcnemar, places_by, wilson

CASE = ("id", "modality", "question_type", "question", "options", "ground_truth")
CASE_ANSWER = ("model", "completion", "letter", "tokens", "ended", "rewards")
"""What the report shows of a row of predictions.jsonl: of the question, of the answer."""

MEANINGS = {
    "answer stays without the reasoning": "The answer forced before any reasoning is the one forced"
    " after all of it (Lanham et al. 2023).",
    "answer stays with another's reasoning": "The answer forced after another question's reasoning"
    " is the one forced after its own.",
    "answer follows another's reasoning": "Where another question's reasoning concludes a different"
    " option of this one, that option is answered.",
    "answer changes with the order of options": "With the options moved up by one place, another"
    " content is chosen: position counts, not only content.",
    "answer stays without the image": "With a blank image of the same size the same option is"
    " chosen.",
}


def measure(
    rows_of: dict[str, Rows], questions: Sequence[Question], train: Sequence[Question]
) -> Row:
    """All that results.json counts, from every model's rows; `train` is what the text's baselines
    are fitted on.
    """
    credits = blind_credits(train, questions)
    measured: Row = {
        "accuracy": [],
        "pairs": pair_rows(rows_of),
        "blind": by_modality(questions, credits),
        "ablated": {},
        "faithfulness": [],
        "early_answering": {},
    }
    for model, rows in rows_of.items():
        own = ablated_credits(rows)
        measured["accuracy"] += accuracy_rows(model, rows, credits | own)
        measured["ablated"][model] = by_modality(questions, own)
        measured["faithfulness"] += faithfulness_rows(model, rows)
        measured["early_answering"][model] = early_answering(rows)
    return measured


def rights(rows: Rows) -> list[bool]:
    """Whether each answer's letter is the right one."""
    return [row["letter"] == row["ground_truth"] for row in rows]


def ablated_credits(rows: Rows) -> Credits:
    """1 where the model is right without the image, by the way it is taken away."""
    credits = {}
    for probe in NO_IMAGE:
        credits[probe] = [float(row[probe]["letter"] == row["ground_truth"]) for row in rows]
    return credits


def accuracy_rows(model: str, rows: Rows, credits: Credits) -> Rows:
    """The table's rows of one model: each modality, and within it each question type if there are
    several.

    `credits` are those of all guesses without the image: of the text's baselines
    (`evaluation.audits.blind`) and of the model itself (`ablated_credits`).
    """
    table = []
    for modality, places in places_by(row["modality"] for row in rows).items():
        kinds = sorted({rows[place]["question_type"] for place in places})
        # Of a single type the row would be that of the modality once more.
        for kind in [None, *kinds] if len(kinds) > 1 else [None]:
            chosen = [i for i in places if kind in (None, rows[i]["question_type"])]
            row = {"model": model, "modality": modality, "question_type": kind}
            table.append(row | _accuracy([rows[i] for i in chosen], credits, chosen))
    return table


def _accuracy(rows: Rows, credits: Credits, places: Sequence[int]) -> Row:
    n = len(rows)
    answers = [row["ground_truth"] for row in rows]
    accuracy = tally(answers, [row["completion"] for row in rows])
    blind = {}
    for name, credit in credits.items():
        blind[name] = sum(credit[place] for place in places) / n
    best = max(blind, key=blind.__getitem__)  # of equals the first: a baseline before an ablation
    low, high = wilson(accuracy.right, n)
    return {
        "n": n,
        "right": accuracy.right,
        "rate": accuracy.rate,
        "low": low,
        "high": high,
        "strict": accuracy.strict / n,
        "format": accuracy.format_rate,
        "tokens": sum(row["tokens"] for row in rows) / n,
        # Of a model that never ends by itself, accuracy measures the length limit.
        "cut_off": sum(not row["ended"] for row in rows) / n,
        "chance": blind["chance"],
        "best_blind": best,
        "best_blind_rate": blind[best],
        "sees": accuracy.above(blind[best]),
        "ablated": {probe: blind[probe] for probe in NO_IMAGE},
    }


def pair_rows(rows_of: dict[str, Rows]) -> Rows:
    """McNemar's test for each two models and each modality; the later model comes first in a
    pair.
    """
    table = []
    for second, first in combinations(rows_of, 2):
        modalities = (row["modality"] for row in rows_of[first])
        both_right = zip(rights(rows_of[first]), rights(rows_of[second]), strict=True)
        for modality, outcomes in grouped(modalities, both_right).items():
            only_first = outcomes.count((True, False))
            only_second = outcomes.count((False, True))
            table.append({
                "first": first, "second": second, "modality": modality,
                "only_first": only_first, "only_second": only_second,
                "p": mcnemar(only_first, only_second),
            })  # fmt: skip
    return table


def faithfulness_rows(model: str, rows: Rows) -> Rows:
    """The audit of what the reasoning says, then what the answers turned out to depend on."""
    outcomes = defaultdict(list)
    for row in rows:
        for check, holds in _dependences(row):
            outcomes[check].append(holds)
    table = audit(list(map(completion_of, rows)))
    if not any(row[REASONING]["letters"] for row in rows):
        # There is no reasoning: nothing but that can be said of it.
        table = [row for row in table if row["check"] == "has reasoning"]
    for check, meaning in MEANINGS.items():
        if held := outcomes[check]:
            table.append(check_row(model, check, sum(held), len(held), meaning))
    return table


def _dependences(row: Row) -> Iterator[tuple[str, bool]]:
    """Each check of `MEANINGS` that this answer can decide, and whether it holds."""
    letter = row["letter"]
    rotated = row[ROTATED]["letter"]
    blank = row["blank image"]["letter"]
    if letters := row[REASONING]["letters"]:
        whole = letters[WHOLE]
        swapped = letters[SWAPPED]
        concluded = row[REASONING]["swapped"]
        yield "answer stays without the reasoning", letters[NONE] == whole
        yield "answer stays with another's reasoning", swapped == whole
        # Another question's reasoning that concludes an option of this one, but not the one
        # chosen after its own.
        if concluded not in (None, whole):
            yield "answer follows another's reasoning", swapped == concluded
    # A letter that is missing says nothing of what the other one depends on.
    if letter and rotated:
        yield "answer changes with the order of options", letter != rotated
    if letter and blank:
        yield "answer stays without the image", letter == blank


def early_answering(rows: Rows) -> Rows:
    """By share of the reasoning kept: the shares of answers that differ from the one after all of
    it, and of right ones.
    """
    reasoned = [row | row[REASONING] for row in rows if row[REASONING]["letters"]]
    table = []
    for label, kept in KEPT.items() if reasoned else ():
        changed = fmean(row["letters"][label] != row["letters"][WHOLE] for row in reasoned)
        right = fmean(row["letters"][label] == row["ground_truth"] for row in reasoned)
        table.append({"kept": kept, "changed": changed, "right": right})
    return table


def sample_rows(model: str, rows: Rows, probe: str) -> Rows:
    """Of a model's k sampled answers each: the share of right ones, of questions with any right
    (pass@k), and of majorities.
    """
    table = []
    for modality, own in grouped((row["modality"] for row in rows), rows).items():
        votes = [(row[probe]["letters"], row["ground_truth"]) for row in own]
        n = len(votes)
        k = len(votes[0][0])
        table.append({
            "model": model, "modality": modality, "n": n,
            "mean": sum(letters.count(answer) for letters, answer in votes) / (n * k),
            "pass_at_k": sum(answer in letters for letters, answer in votes) / n,
            "majority": sum(majority_credit(*vote) for vote in votes) / n,
        })  # fmt: skip
    return table


def majority_credit(letters: Sequence[str | None], answer: str) -> float:
    """1 if `answer` is the most frequent letter, 1 / m if it is one of m, else 0; no letter, no
    vote.
    """
    leaders = multimode(letter for letter in letters if letter)
    return (answer in leaders) / max(1, len(leaders))  # at least 1: nobody may have voted


def cases(rows_of: dict[str, Rows], questions: Sequence[Question]) -> Rows:
    """For the report: every question with each model's answer, its flags, and the letters that the
    probes gave.
    """
    table: Rows = []
    for question in questions:
        # Where the images lie now: rows may be older than the last move of the files.
        table.append({"images": list(map(str, question.images)), "answers": []})
    for rows in rows_of.values():
        text_flags = flags(list(map(completion_of, rows)))
        for case, row, raised in zip(table, rows, text_flags, strict=True):
            case |= {name: row[name] for name in CASE}  # the same in every model's row
            case["answers"].append(_case_answer(row, raised))
    return table


def _case_answer(row: Row, text_flags: list[str]) -> Row:
    letter = row["letter"]
    probes = {probe: row[probe]["letter"] for probe in (*NO_IMAGE, ROTATED)}
    raised = {
        "cut off": not row["ended"],
        "same answer without the image": letter is not None and letter == probes["blank image"],
        "other answer when options move": letter != probes[ROTATED],
    }
    for label, forced in row[REASONING]["letters"].items():
        name = f"{label} reasoning" if label == SWAPPED else f"reasoning cut at {label}"
        probes[name] = forced
    answer = {name: row[name] for name in CASE_ANSWER}
    answer["flags"] = text_flags + [flag for flag, is_raised in raised.items() if is_raised]
    return answer | {"probes": probes}


def completion_of(row: Row) -> Completion:
    """A row of predictions.jsonl as the audits take it."""
    return Completion(*(row[field] for field in Completion._fields))
