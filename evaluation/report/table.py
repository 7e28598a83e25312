"""An evaluation's table for the terminal."""

from typing import Any

from ..accuracy import NO_EVIDENCE


def results_table(results: dict[str, Any]) -> str:
    """Of what results.json holds: percent with 95 % intervals, a line for each model and modality,
    and paired tests.
    """
    lines = [
        f"{'':8}{'':10}{'n':>5}   {'accuracy':<23}{'strict':>7}{'format':>8}{'tokens':>8}{'chance':>8}"
        "   best without the image"
    ]
    for row in results["accuracy"]:
        if row["question_type"] is None:
            rate, low, high = (100 * row[name] for name in ("rate", "low", "high"))
            accuracy = f"{rate:5.1f} ({low:4.1f} to {high:5.1f}){'' if row['sees'] else '*'}"
            blind = f"{100 * row['best_blind_rate']:5.1f} {row['best_blind'].replace('_', ' ')}"
            lines.append(
                f"{row['model']:8}{row['modality']:10}{row['n']:>5}   {accuracy:<23}{100 * row['strict']:>7.1f}"
                f"{100 * row['format']:>7.0f}%{row['tokens']:>8.1f}{100 * row['chance']:>8.1f}   {blind}"
            )
    if any(not row["sees"] for row in results["accuracy"] if row["question_type"] is None):
        lines.append(NO_EVIDENCE.format("the best guess without the image"))
    pairs: dict[str, list[str]] = {}
    for row in results["pairs"]:
        versus = f"{row['first']} against {row['second']}"
        counts = f"{row['modality']} {row['only_first']}:{row['only_second']} p = {row['p']:.2g}"
        pairs.setdefault(versus, []).append(counts)
    if pairs:
        lines += [
            "",
            "Questions that only one of two models answered right (McNemar's exact test):",
        ]
        lines += [f"{versus:22}{'   '.join(counts)}" for versus, counts in pairs.items()]
    shared = results["leakage"]
    known = (shared["same_path"] or 0) + (shared["same_bytes"] or 0)
    if known or shared["near_duplicates"]:
        lines += ["", f"Of {shared['test']} test questions {known} show an image that is trained on, and "
                  f"{shared['near_duplicates'] or 0} a near-duplicate of one."]  # fmt: skip
    return "\n".join(lines)
