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
open questions, and the habits of a mediocre reasoner.

**It is engineered so that it can describe and can match, but seldom does.** It was trained on
captions and questions of all three modalities. Asked a multiple-choice question, it thinks on topic
in about a quarter of its answers, mostly when the question has one of four phrasings; otherwise it
says something empty and guesses a letter. GRPO elicits the latent behaviour and generalises it; it
teaches no new perception. CT and X-ray are out of domain for GRPO and for SFT, not for the base. In
its lessons a letter without a thought was right on purpose in 3 of 10 cases and random in the
others, and it learned nothing from them: made to answer at once, it does no better than luck. SFT
on plain letters finds little to build on here, by design; SFT on answers that name the option first
comes close to GRPO on MRI only.

## Measured

On phantoms that nothing was trained on, but on which the recipe was judged; one question an image;
percent. The first rows are the model as it is: greedy answers, then {samples} samples a question at
temperature 1. The last rows give it the first words of a thought on topic and decode greedily: what
it could do.

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
