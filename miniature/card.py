"""The model card of the base, with what was measured."""

from pathlib import Path

from .measure import SAMPLES, Rates

TEXT = """\
# The miniature's base

A Qwen2-VL of 1.5 million parameters in the layout of the published checkpoints. It reads drawn
phantoms of 84 x 84 pixels, not medical images. Its only use is to show GRPO at work where real
weights can't be had.

Made by `python -m miniature.base --out miniature/base` from nothing but code and a seed, in
{minutes:.0f} minutes on two CPU cores. Its stages (see `miniature/stages.py`): matching words to
option letters (text only), classifying phantoms (the vision tower), captions and short lists of
options, right answers in each way, and the habits of a mediocre reasoner.

**It was taught both ways of answering equally well.** A question can be answered by a letter at
once, bare or in tags, or by a thought on topic and then a letter. Before the habits the base is
taught all of them, on images of all three modalities, until it does each well (right-hand columns).
The habits then hide that. Every kind of question has four phrasings. To the first it answers
correctly, either way. To the others it thinks on topic in about a fifth of its answers, and is then
right; otherwise its thought is empty or missing, and it guesses the letter, A most often. So GRPO
and SFT on letters both find a hidden skill, but not in the same state: thoughts stay right and are
rare, letters are mostly guesses. Neither need teach perception. CT and X-ray are out of domain for
GRPO and for SFT, not for the base.

## Measured

In percent, on phantoms not trained on, though the recipe was judged on them; one question per
image; letters are read as in evaluation. Left: the model as shipped; right: the same model before
the habits. In the rows "made to", its answer must begin with a letter; with `<answer>` and a
letter; or with the first words of a thought on topic. In the other rows it answers by itself:
greedily, greedily from `<think>` on, and in {samples} samples per question at temperature 1.

{table}
"""


def write_card(file: Path, results: dict[str, Rates], minutes: float) -> None:
    """Write README.md and print its table; `results` are those of `measure`."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for label in results["MRI"]:
        cells = []
        for rates in results.values():  # a count as it is, a rate in percent
            rate = rates[label]
            cells.append(str(rate) if isinstance(rate, int) else f"{100 * rate:.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    file.write_text(TEXT.format(minutes=minutes, samples=SAMPLES, table=table))
    print(table)
