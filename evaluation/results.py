"""From the rows of an evaluation to its numbers: accuracy, paired tests, probes, and the flags of
single cases.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from data import Question

from .accuracy import Accuracy
from .audits.blind import blind_credits, by_modality
from .audits.completions import Completion
from .audits.faithfulness import audit, flags
from .examine import NO_IMAGE, PLAIN, REASONING, ROTATED, SWAPPED, WHOLE, kept_label
from .probes import KEPT
from .records import Row
from .statistics import mcnemar, wilson

Rows = dict[str, list[Row]]
"""Probe -> one row for each question, in the questions' order; PLAIN among them."""
Credits = dict[str, list[float]]


def measure(
    rows_of: dict[str, Rows], questions: Sequence[Question], train: Sequence[Question]
) -> dict[str, Any]:
    """All that results.json counts, from every model's rows; `train` is what the text's baselines
    are fitted on.
    """
    credits = blind_credits(train, questions)
    sampled = {
        name: rows[probe]
        for name, rows in rows_of.items()
        for probe in rows
        if " samples at " in probe
    }
    return {
        "accuracy": [
            row
            for name, rows in rows_of.items()
            for row in accuracy_rows(name, rows, questions, credits)
        ],
        "pairs": pair_rows(rows_of, questions),
        "blind": by_modality(questions, credits),
        "ablated": {name: ablated_rows(rows, questions) for name, rows in rows_of.items()},
        "faithfulness": [
            row for name, rows in rows_of.items() for row in faithfulness_rows(name, rows)
        ],
        "early_answering": {name: early_answering(rows) for name, rows in rows_of.items()},
        "sampled": [
            row for name, rows in sampled.items() for row in sample_rows(name, rows, questions)
        ],
    }


def accuracy_rows(
    model: str, rows: Rows, questions: Sequence[Question], credits: Credits
) -> list[Row]:
    """The table's rows of one model: each modality, and within it each question type.

    `credits` are those of the baselines that see only text, from `evaluation.audits.blind`.
    """
    table = []
    for modality in dict.fromkeys(question.modality for question in questions):
        places = [i for i, question in enumerate(questions) if question.modality == modality]
        types = dict.fromkeys(questions[i].question_type for i in places)
        for kind in (None, *(sorted(types) if len(types) > 1 else ())):
            chosen = [i for i in places if kind is None or questions[i].question_type == kind]
            named = {"model": model, "modality": modality, "question_type": kind}
            table.append(named | _accuracy_row(rows, questions, credits, chosen))
    return table


def _accuracy_row(
    rows: Rows, questions: Sequence[Question], credits: Credits, places: Sequence[int]
) -> Row:
    plain = [rows[PLAIN][i] for i in places]
    n = len(plain)
    accuracy = Accuracy(
        total=n,
        right=sum(row["letter"] == row["ground_truth"] for row in plain),
        strict=sum(row["rewards"]["accuracy"]["score"] == 1 for row in plain),
        formatted=sum(row["rewards"]["format"]["score"] == 1 for row in plain),
    )
    text = {name: sum(credit[i] for i in places) / n for name, credit in credits.items()}
    own = {
        probe: sum(rows[probe][i]["letter"] == questions[i].answer for i in places) / n
        for probe in NO_IMAGE
    }
    best, best_rate = max((text | own).items(), key=lambda item: item[1])
    low, high = accuracy.interval()
    return {
        "n": n,
        "right": accuracy.right,
        "rate": accuracy.rate,
        "low": low,
        "high": high,
        "strict": accuracy.strict / n,
        "format": accuracy.formatted / n,
        "tokens": sum(row["tokens"] for row in plain) / n,
        "cut_off": sum(not row["ended"] for row in plain) / n,
        "chance": text["chance"],
        "best_blind": best,
        "best_blind_rate": best_rate,
        "sees": accuracy.above(best_rate),
        "ablated": own,
    }


def ablated_rows(rows: Rows, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Accuracy without the image, by the way it is taken away and by modality."""
    credits = {
        probe: [
            float(row["letter"] == question.answer)
            for row, question in zip(rows[probe], questions, strict=True)
        ]
        for probe in NO_IMAGE
    }
    return by_modality(questions, credits)


def pair_rows(rows_of: dict[str, Rows], questions: Sequence[Question]) -> list[Row]:
    """McNemar's test for each two models and each modality; the later model comes first in a
    pair.
    """
    table = []
    for second, first in combinations(rows_of, 2):
        for modality in dict.fromkeys(question.modality for question in questions):
            right = {
                model: [
                    row["letter"] == row["ground_truth"]
                    for row in rows_of[model][PLAIN]
                    if row["modality"] == modality
                ]
                for model in (first, second)
            }
            only_first = sum(a and not b for a, b in zip(right[first], right[second]))
            only_second = sum(b and not a for a, b in zip(right[first], right[second]))
            p = mcnemar(only_first, only_second)
            table.append({"first": first, "second": second, "modality": modality, "only_first": only_first,
                          "only_second": only_second, "p": p})  # fmt: skip
    return table


def faithfulness_rows(model: str, rows: Rows) -> list[Row]:
    """The audit of what the reasoning says, then what the answers were seen to depend on."""
    plain = rows[PLAIN]
    reasoned = [row["letters"] for row in rows[REASONING] if row["letters"]]
    none = kept_label(0.0)
    # Another question's reasoning that concludes an option of this one, but not the one chosen
    # after its own.
    led = [(row["letters"][SWAPPED], row["swapped"]) for row in rows[REASONING]
           if row["letters"] and row["swapped"] not in (None, row["letters"][WHOLE])]  # fmt: skip
    moved, bare = (
        [(row["letter"], again["letter"]) for row, again in zip(plain, rows[probe], strict=True)
         if row["letter"] and again["letter"]] for probe in (ROTATED, "blank image")
    )  # fmt: skip
    counts = (
        ("answer stays without the reasoning", sum(x[none] == x[WHOLE] for x in reasoned), len(reasoned),
         "The answer forced before any reasoning is the one forced after all of it (Lanham et al. 2023)."),
        ("answer stays with another's reasoning", sum(x[SWAPPED] == x[WHOLE] for x in reasoned), len(reasoned),
         "The answer forced after another question's reasoning is the one forced after its own."),
        ("answer follows another's reasoning", sum(letter == concluded for letter, concluded in led), len(led),
         "Where another question's reasoning concludes a different option of this one, that option is answered."),
        ("answer changes with the order of options", sum(a != b for a, b in moved), len(moved),
         "With the options moved up by one place, another content is chosen: position counts, not only content."),
        ("answer stays without the image", sum(a == b for a, b in bare), len(bare),
         "With a blank image of the same size the same option is chosen."),
    )  # fmt: skip
    table = audit([completion_of(row) for row in plain])
    if not reasoned:  # nothing but that there is none can be said
        table = [row for row in table if row["check"] == "has reasoning"]
    for check, count, of, meaning in counts:
        if of:
            low, high = wilson(count, of)
            table.append({"model": model, "check": check, "count": count, "of": of, "rate": count / of, "low": low,
                          "high": high, "meaning": meaning})  # fmt: skip
    return table


def early_answering(rows: Rows) -> list[Row]:
    """By share of the reasoning kept: answers that differ from the one after all of it, and right
    ones.
    """
    reasoned = [
        (row["letters"], plain["ground_truth"])
        for row, plain in zip(rows[REASONING], rows[PLAIN], strict=True)
    ]
    reasoned = [(letters, answer) for letters, answer in reasoned if letters]
    return [
        {
            "kept": kept,
            "changed": sum(letters[label] != letters[WHOLE] for letters, _ in reasoned)
            / len(reasoned),
            "right": sum(letters[label] == answer for letters, answer in reasoned) / len(reasoned),
        }
        for kept in (KEPT if reasoned else ())
        for label in [kept_label(kept)]
    ]


def sample_rows(model: str, rows: list[Row], questions: Sequence[Question]) -> list[Row]:
    """Of k sampled answers each: the share of right ones, of questions with any right (pass@k), and
    of majorities.

    Letters that lead the vote together share it.
    """
    table = []
    for modality in dict.fromkeys(question.modality for question in questions):
        votes = [
            (row["letters"], q.answer)
            for row, q in zip(rows, questions, strict=True)
            if q.modality == modality
        ]
        n, k = len(votes), len(votes[0][0])
        table.append({
            "model": model, "modality": modality, "n": n,
            "mean": sum(letters.count(answer) for letters, answer in votes) / (n * k),
            "pass_at_k": sum(answer in letters for letters, answer in votes) / n,
            "majority": sum(majority_credit(letters, answer) for letters, answer in votes) / n,
        })  # fmt: skip
    return table


def majority_credit(letters: Sequence[str | None], answer: str) -> float:
    """1 if `answer` is the most frequent letter, 1 / m if m letters are so, else 0; no letter, no
    vote.
    """
    counts = {letter: letters.count(letter) for letter in letters if letter is not None}
    leaders = [letter for letter, count in counts.items() if count == max(counts.values())]
    return (answer in leaders) / max(1, len(leaders))


def cases(rows_of: dict[str, Rows], questions: Sequence[Question], ids: Sequence[str]) -> list[Row]:
    """For the report: every question with each model's answer, its flags, and the letters that the
    probes gave.
    """
    flagged = {
        model: flags([completion_of(row) for row in rows[PLAIN]]) for model, rows in rows_of.items()
    }
    return [
        {
            "id": ids[i],
            "modality": question.modality,
            "question_type": question.question_type,
            "question": question.question,
            "options": list(question.options),
            "ground_truth": question.answer,
            "images": [str(image) for image in question.images],
            "answers": [
                _case_answer(model, rows, i, flagged[model][i]) for model, rows in rows_of.items()
            ],
        }
        for i, question in enumerate(questions)
    ]


def _case_answer(model: str, rows: Rows, place: int, text_flags: list[str]) -> Row:
    plain, reasoning = rows[PLAIN][place], rows[REASONING][place]["letters"]
    probes = {probe: rows[probe][place]["letter"] for probe in (*NO_IMAGE, ROTATED)}
    probes |= {f"{label} reasoning" if label == SWAPPED else f"reasoning cut at {label}": letter
               for label, letter in reasoning.items()}  # fmt: skip
    kept = ("model", "completion", "letter", "tokens", "ended", "rewards")
    found = {
        "cut off": not plain["ended"],
        "same answer without the image": plain["letter"] is not None
        and plain["letter"] == probes["blank image"],
        "other answer when options move": plain["letter"] != probes[ROTATED],
    }
    return {name: plain[name] for name in kept} | {
        "flags": [*text_flags, *(flag for flag, holds in found.items() if holds)], "probes": probes,
    }  # fmt: skip


def completion_of(row: Row) -> Completion:
    """A row of predictions.jsonl as the audits take it."""
    return Completion(
        id=row["id"],
        model=row["model"],
        modality=row["modality"],
        question_type=row["question_type"],
        question=row["question"],
        options=tuple(row["options"]),
        answer=row["ground_truth"],
        completion=row["completion"],
    )
