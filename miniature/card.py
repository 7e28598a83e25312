"""The model card of the base, with what was measured."""

from pathlib import Path

TEXT = """\
# The miniature's base

A Qwen2-VL of 1.5 million parameters in the layout of the published checkpoints. It reads drawn phantoms of 84 x 84
pixels, not medical images, and is of no use but to show GRPO at work where real weights can't be had.

Made by `python -m miniature.base --out miniature/base` from nothing but code and a seed, in {minutes:.0f} minutes on
two CPU cores. The stages, each explained in `miniature/stages.py`: matching words to option letters (text only),
classifying phantoms (the vision tower), captions and open questions, and the habits of a mediocre reasoner.

**It is engineered so that it can describe and can match, but seldom does.** It has seen captions and questions of all
three modalities. Asked a multiple-choice question, it thinks on topic in about a quarter of its answers, mostly when
the question has one of four phrasings; otherwise it says something empty and guesses a letter. GRPO elicits the latent
behaviour and generalises it; it teaches no new perception. CT and X-ray are out of domain for GRPO and for SFT, not for
the base. A letter without a thought was right in 3 of 10 lessons, no better than luck: SFT on plain letters finds
little to build on here, by design; SFT on answers that name the option first comes close to GRPO on MRI only.

## Measured

On phantoms that nothing was trained on, but on which the recipe was judged; one question an image; percent. The
first rows are the model as it is: greedy answers, then 4 samples a question at temperature 1. The last rows give it the
first words of a thought on topic and decode greedily: what it could do.

| | {names} |
|---|{rule}
{rows}
"""
LABELS = {
    "n": "questions",
    "chance": "chance (1 / options)",
    "zero-shot": "greedy: right letter",
    "greedy format": "greedy: format followed",
    "sampled right": "sampled: right letter",
    "format": "sampled: format followed",
    "on topic": "sampled: format followed and on topic",
    "letter": "of these: right letter",
    "names modality": "given a start: names the modality",
    "names anatomy": "given a start: names the anatomy",
    "names finding": "given a start: names the finding",
    "names side": "given a start: names the side",
    "forced letter": "given a start: right letter",
}


def write_card(
    path: Path, results: dict[str, dict[str, float]], minutes: float, samples: int
) -> None:
    """Write README.md and print its table; `results` are those of `measure`."""
    rows = []
    for key, label in LABELS.items():
        cells = [
            f"{rates[key]}" if key == "n" else f"{100 * rates[key]:.1f}"
            for rates in results.values()
        ]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    table = "\n".join(rows)
    head = {"names": " | ".join(results), "rule": "---|" * len(results)}
    path.write_text(TEXT.format(minutes=minutes, samples=samples, rows=table, **head))
    print(table)
