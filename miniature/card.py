"""The model card of the base, with what was measured."""

from pathlib import Path

from .measure import SAMPLES, Rates

TEXT = """\
# The miniature's base

A Qwen2-VL of 1.5 million parameters in the layout of the published checkpoints. It reads drawn
phantoms of 84 x 84 pixels, not medical images, and is of no use but to show GRPO at work where real
weights can't be had.

Made by `python -m miniature.base --out miniature/base` from nothing but code and a seed, in
{minutes:.0f} minutes on two CPU cores. The stages, each explained in `miniature/stages.py`:
matching words to option letters (text only), classifying phantoms (the vision tower), captions and
short lists of options, right answers in each way, and the habits of a mediocre reasoner.

**It favours neither way of answering.** A question can be answered by a letter at once, bare or in
tags, or by a thought on topic and then a letter. Before the habits the base is taught all of them,
on images of all three modalities, until it does each well. The habits then hide what it can do.
Every question has four phrasings. For the first one it answers rightly, either way. For the other
three it thinks on topic in about a fifth of its answers, and then is right; else it says something
empty or nothing, and guesses the letter, A more often than the others. So GRPO and SFT on letters
both find a hidden skill to bring out, and teach no new perception. CT and X-ray are out of domain
for GRPO and for SFT, not for the base.

## Measured

On phantoms that nothing was trained on, but on which the recipe was judged; one question an image;
percent; letters are read as evaluation reads them. Three columns are the model as it is shipped,
three the same model before the habits. Where it is made to answer in one way, its first token must
be a letter, or its answer begins with `<answer>` and then a letter, or with the first words of a
thought on topic. The other rows are the model as it answers by itself: greedily, greedily from
`<think>` on, and in {samples} samples a question at temperature 1.

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
