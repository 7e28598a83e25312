"""An evaluation's table for the terminal."""

from ..accuracy import NO_EVIDENCE
from ..records import Row
from ..statistics import grouped, percent, percent_with_interval

PAIR = "{modality} {only_first}:{only_second} p = {p:.2g}"
# Wide enough for base, sft and grpo; a longer name shifts only its own line.
LINE = "{:8}{:10}{:>5}   {:<23}{:>7}{:>8}{:>8}{:>8}   {:>5} {}"


def results_table(results: Row) -> str:
    """The accuracy of each model on each modality, in percent with 95 % intervals, and the paired
    tests. `results` is the content of results.json.
    """
    whole = [row for row in results["accuracy"] if row["question_type"] is None]
    heads = ("n", "accuracy", "strict", "format", "tokens", "chance", "best", "without the image")
    lines = [LINE.format("", "", *heads), *map(_line, whole)]
    if not all(row["sees"] for row in whole):
        lines.append(NO_EVIDENCE.format("the best guess without the image"))
    versus = (f"{row['first']} vs. {row['second']}" for row in results["pairs"])
    pairs = grouped(versus, map(PAIR.format_map, results["pairs"]))
    if pairs:
        heading = "Questions that only one of the two answered right (McNemar's exact test):"
        lines += ["", heading]
    for models, cells in pairs.items():
        lines.append(f"{models:22}{'   '.join(cells)}")
    shared = results["leakage"]
    near = shared["near_duplicates"] or 0  # None where images are missing
    known = shared["same_path"] + (shared["same_bytes"] or 0)
    if known or near:
        warning = f"{known} show a training image, and {near} a near-duplicate of one."
        lines += ["", f"Of {shared['test']} test questions, {warning}"]
    return "\n".join(lines)


def _line(row: Row) -> str:
    return LINE.format(
        row["model"],
        row["modality"],
        row["n"],
        percent_with_interval(row["right"], row["n"]) + ("" if row["sees"] else "*"),
        percent(row["strict"]),
        percent(row["format"]),
        round(row["tokens"], 1),
        percent(row["chance"]),
        percent(row["best_blind_rate"]),
        row["best_blind"].replace("_", " "),
    )
