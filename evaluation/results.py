"""Turn an evaluation's rows into numbers: accuracy, paired tests, probes, flags of each case."""

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
"""The fields of a predictions.jsonl row that the report shows: of the question, and of the answer.
"""

MEANINGS = {
    "answer stays without the reasoning": "Forced before any reasoning, the answer is the same as"
    " after all of it (Lanham et al. 2023).",
    "answer stays with swapped reasoning": "Forced after another question's reasoning, the answer"
    " is the same as after the model's own.",
    "answer follows swapped reasoning": "Of the cases where the other question's reasoning"
    " concludes a different option, those where the model answers that option.",
    "answer changes with the order of options": "With the options rotated by one place, the model"
    " chooses a different option: position matters, not only content.",
    "answer stays without the image": "With a blank image of the same size, the model chooses the"
    " same option.",
}


def measure(
    rows_of: dict[str, Rows], questions: Sequence[Question], train: Sequence[Question]
) -> Row:
    """The measurements in results.json, from every model's rows. The text baselines are fitted on
    `train`.
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
    """Whether each answer is right."""
    return [row["letter"] == row["ground_truth"] for row in rows]


def ablated_credits(rows: Rows) -> Credits:
    """For each way to remove the image: 1 where the model is right without it, 0 elsewhere."""
    credits = {}
    for probe in NO_IMAGE:
        credits[probe] = [float(row[probe]["letter"] == row["ground_truth"]) for row in rows]
    return credits


def accuracy_rows(model: str, rows: Rows, credits: Credits) -> Rows:
    """One model's rows of the accuracy table: each modality, and each question type within it if
    there are several.

    `credits` hold all guesses without the image: the text baselines (`evaluation.audits.blind`) and
    the model itself (`ablated_credits`).
    """
    table = []
    for modality, places in places_by(row["modality"] for row in rows).items():
        kinds = sorted({rows[place]["question_type"] for place in places})
        # The row of a single type would repeat that of the modality.
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
    best = max(blind, key=blind.__getitem__)  # the first if tied: a baseline before an ablation
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
        # For a model that never ends its turn, accuracy measures the length limit.
        "cut_off": sum(not row["ended"] for row in rows) / n,
        "chance": blind["chance"],
        "best_blind": best,
        "best_blind_rate": blind[best],
        "sees": accuracy.above(blind[best]),
        "ablated": {probe: blind[probe] for probe in NO_IMAGE},
    }


def pair_rows(rows_of: dict[str, Rows]) -> Rows:
    """McNemar's test for each pair of models and each modality. The later model comes first."""
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
    """The audit of the reasoning's text, then the probes of what the answers depend on."""
    outcomes = defaultdict(list)
    for row in rows:
        for check, holds in _dependences(row):
            outcomes[check].append(holds)
    table = audit(list(map(completion_of, rows)))
    if not any(row[REASONING]["letters"] for row in rows):
        # Without any reasoning, its absence is all there is to report.
        table = [row for row in table if row["check"] == "has reasoning"]
    for check, meaning in MEANINGS.items():
        if held := outcomes[check]:
            table.append(check_row(model, check, sum(held), len(held), meaning))
    return table


def _dependences(row: Row) -> Iterator[tuple[str, bool]]:
    """Yields each check of `MEANINGS` that applies to this row, and whether it holds."""
    letter = row["letter"]
    rotated = row[ROTATED]["letter"]
    blank = row["blank image"]["letter"]
    if letters := row[REASONING]["letters"]:
        whole = letters[WHOLE]
        swapped = letters[SWAPPED]
        concluded = row[REASONING]["swapped"]
        yield "answer stays without the reasoning", letters[NONE] == whole
        yield "answer stays with swapped reasoning", swapped == whole
        # Only if the other reasoning concludes one of these options, and not the model's own
        # choice.
        if concluded not in (None, whole):
            yield "answer follows swapped reasoning", swapped == concluded
    # A missing letter can't be compared.
    if letter and rotated:
        yield "answer changes with the order of options", letter != rotated
    if letter and blank:
        yield "answer stays without the image", letter == blank


def early_answering(rows: Rows) -> Rows:
    """For each share of the reasoning kept: the share of answers that differ from the answer after
    all of it, and the share of right answers.
    """
    reasoned = [row | row[REASONING] for row in rows if row[REASONING]["letters"]]
    table = []
    for label, kept in KEPT.items() if reasoned else ():
        changed = fmean(row["letters"][label] != row["letters"][WHOLE] for row in reasoned)
        right = fmean(row["letters"][label] == row["ground_truth"] for row in reasoned)
        table.append({"kept": kept, "changed": changed, "right": right})
    return table


def sample_rows(model: str, rows: Rows, probe: str) -> Rows:
    """Of k sampled answers to each question: the share that are right, pass@k (the share of
    questions with any right answer), and the share of right majority votes.
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
    """1 if `answer` is the most frequent letter, 1 / m if it is one of m that tie, else 0. Missing
    letters do not count.
    """
    leaders = multimode(letter for letter in letters if letter)
    return (answer in leaders) / max(1, len(leaders))  # no leaders if all letters are missing


def cases(rows_of: dict[str, Rows], questions: Sequence[Question]) -> Rows:
    """The cases of the report: every question with each model's answer, its flags, and its letters
    under each probe.
    """
    table: Rows = []
    for question in questions:
        # The current image paths: the files may have moved since the rows were written.
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
        "truncated": not row["ended"],
        "same answer without the image": letter is not None and letter == probes["blank image"],
        "different answer with permuted options": letter != probes[ROTATED],
    }
    for label, forced in row[REASONING]["letters"].items():
        name = "swapped reasoning" if label == SWAPPED else f"reasoning truncated to {label}"
        probes[name] = forced
    answer = {name: row[name] for name in CASE_ANSWER}
    answer["flags"] = text_flags + [flag for flag, is_raised in raised.items() if is_raised]
    return answer | {"probes": probes}


def completion_of(row: Row) -> Completion:
    """The completion in a row of predictions.jsonl, in the form that the audits take."""
    return Completion(*(row[field] for field in Completion._fields))
