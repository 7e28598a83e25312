"""The arms of the study: how each differs from the others, and what all of them share.

All that the study decides beforehand: the arms, the rates and lengths that are tried, the rule that
chooses among them, the seeds and the bases. docs/study.md says what was changed on the way.
"""

from typing import NamedTuple

from ..base import SEED

GRPO_CONFIG, SFT_CONFIG = "configs/miniature.toml", "configs/miniature_sft.toml"
TEST = "build/miniature/test.json"
TRAIN = "build/miniature/train.json"

RATES = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")
LENGTHS = (50, 100, 150)  # steps of 16 questions; a trial has 150 and is validated at each
TRIAL_SEED = 0  # of no run that is tested: a lucky trial must not be counted as a result


class Base(NamedTuple):
    """A base model."""

    name: str
    seed: int  # that it is made with
    seeds: tuple[int, ...]  # of the runs on it


SHIPPED = Base("shipped", SEED, (1, 2, 3))
BASES = (SHIPPED, Base("second", SEED + 1, (1,)), Base("third", SEED + 2, (1,)))
"""The study makes all but the first."""


class Arm(NamedTuple):
    """One way to train."""

    name: str  # in tables
    folder: str  # of its runs
    config: str
    flags: tuple[str, ...] = ()  # fields that differ from the config, as on the command line
    begins_with: "Arm | None" = None  # whose trained model it goes on from; None for the base


SFT_TAGS = Arm("SFT, letters in tags", "sft-tags", SFT_CONFIG, ("--sft_answer", "tags"))
GRPO = Arm("GRPO", "grpo", GRPO_CONFIG)
# GRPO but for the images of training. The rate and length of the controls are chosen with the real
# images, like those of all arms: the best that training without sight can do.
CONTROLS = (
    Arm("GRPO, grey images", "grpo-blank", GRPO_CONFIG, ("--images", "blank")),
    Arm("GRPO, noise", "grpo-noise", GRPO_CONFIG, ("--images", "noise")),
    Arm("GRPO, another question's images", "grpo-other", GRPO_CONFIG, ("--images", "other")),
)
ARMS = (
    Arm("SFT, bare letters", "sft-bare", SFT_CONFIG, ("--sft_answer", "bare")),
    SFT_TAGS,
    Arm("SFT, option named first", "sft-named", SFT_CONFIG, ("--sft_answer", "named")),
    GRPO,
    Arm("SFT on letters in tags, then GRPO", "sft-grpo", GRPO_CONFIG, begins_with=SFT_TAGS),
    *CONTROLS,
)
