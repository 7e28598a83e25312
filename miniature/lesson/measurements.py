"""What each knob of the method does to the gradient.

A lesson is a function that measures; its docstring is printed under its table. All start from the
setting `UNBIASED`, whose expected gradient is the exact one, and turn one knob of it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from markupsafe import Markup
from torch.func import grad, vmap

from common.config import Config
from evaluation.report.curves import HEIGHT, panel_svg
from grpo.advantages import BASELINES, SCALES
from grpo.loss import AVERAGES, KL_ESTIMATES, RATIOS

from . import gradient, policy
from .gradient import Comparison, Groups, compare, mean_of, step_gradients
from .policy import LIMIT, QUESTIONS, START

EXACT = policy.exact_gradient(START)
UNBIASED = Config(
    advantage_baseline="leave_one_out",
    advantage_scale="none",
    loss_average="constant",
    beta=0.0,
    prompts_per_step=len(QUESTIONS),
    group_size=8,
    max_new_tokens=LIMIT,
    # A run needs these, a table of logits does not.
    run_dir="none",
    model="none",
    train_questions="none",
)
GROUP_SIZES = (2, 4, 8, 64)
CLIPS = {"none": (1.0, 1e9), "0.2": (0.2, 0.2), "GSPO's": (3e-4, 4e-4)}
"""Name -> clip_low and clip_high; "none" bounds no ratio."""
TOP_LABEL = 28  # pixels: the next line of text is below the title and the highest tick
COLOURS = ("blue", "orange", "violet", "grey")

Row = dict[str, str]
"""Column -> cell. All rows of a table have the same columns."""
Points = list[tuple[float, float]]
Lesson = tuple[list[Row], list[Markup]]
"""The rows of a table, and panels of the picture."""
Measured = dict[int, dict[str, Comparison]]
"""Group size -> setting of a knob -> its gradient."""


def draw(
    title: str, unit: str, lines: Mapping[str, Points], top: float = 0.0, labels_below: bool = False
) -> Markup:
    """A panel with a line for each label. Labels below are at the bottom right, where no line ends,
    and not at the top.
    """
    series = []
    for (label, points), colour in zip(lines.items(), COLOURS, strict=False):
        series.append((label, colour, points))
    labels = HEIGHT - 30 - 12 * len(series) if labels_below else TOP_LABEL
    return panel_svg(title, series, unit, top, labels)


def sample_steps(group_size: int, replicates: int, logits_QPV: torch.Tensor = START) -> Groups:
    """Steps that ask each question once. Larger groups have less noise: fewer steps will do."""
    questions_RN = torch.arange(len(QUESTIONS)).expand(replicates * 8 // max(8, group_size), -1)
    # Every knob gets the same samples: the rows of a table don't differ by luck.
    generator = torch.Generator().manual_seed(0)
    return gradient.sample_groups(logits_QPV, questions_RN, group_size, generator)


def measure_knob(
    field: str, values: Sequence[str], replicates: int, bonus: float = 0.0
) -> Measured:
    """`bonus` is added to all rewards."""
    measured: Measured = {}
    for size in GROUP_SIZES:
        groups = sample_steps(size, replicates)
        groups = groups._replace(rewards_NG=groups.rewards_NG + bonus)
        measured[size] = {}
        for value in values:
            knob: dict[str, Any] = {field: value}
            gradients, _ = step_gradients(replace(UNBIASED, **knob), groups)
            measured[size][value] = compare(gradients, EXACT)
    return measured


def knob_rows(knob: str, measured: Measured) -> list[Row]:
    rows = []
    for size, by_name in measured.items():
        for name, one in by_name.items():
            rows.append({"G": str(size), knob: name, **one.cells()})
    return rows


def questions(replicates: int) -> Lesson:
    """The four questions. A group whose rewards are all equal teaches nothing (unless there is no
    baseline). For a nearly hopeless or nearly solved question that is most groups, unless they are
    large.
    """
    rewards_Q = policy.expected_rewards(START)
    lengths_Q = policy.probabilities(START) @ policy.MASK_OT.sum(-1).double()
    rows = []
    lines: dict[str, Points] = {name: [] for name in QUESTIONS}
    for q, name in enumerate(QUESTIONS):
        row = {"question": name}
        row["expected reward"] = f"{rewards_Q[q]:.3f}"
        row["mean length"] = f"{lengths_Q[q]:.2f}"
        row["gradient"] = f"{EXACT[q].norm():.4f}"
        rows.append(row)
    for size in GROUP_SIZES:
        share_Q = sample_steps(size, replicates).have_equal_rewards().double().mean(0).tolist()
        for row, share in zip(rows, share_Q, strict=True):
            row[f"equal, G = {size}"] = f"{100 * share:.1f} %"
            lines[row["question"]].append((math.log2(size), share))
    return rows, [draw("Groups with equal rewards", "log2 of G", lines, top=1.0)]


def baselines(replicates: int) -> Lesson:
    """No baseline turns the gradient. mean shortens it, and its noise alike, by (G - 1) / G. With
    rewards of 0 and 1, doing without is no noisier in small groups, whose mean is a noisy number
    itself. With 1 added to all rewards (as for a format that is always right) it is far noisier;
    mean and leave_one_out would not change.
    """
    measured = measure_knob("advantage_baseline", sorted(BASELINES), replicates)
    raised = measure_knob("advantage_baseline", ["none"], replicates, bonus=1.0)
    length: dict[str, Points] = defaultdict(list)
    noise: dict[str, Points] = defaultdict(list)
    for size, by_name in measured.items():
        by_name["none, rewards + 1"] = raised[size]["none"]
        for name, one in by_name.items():
            length[name].append((math.log2(size), one.length.value))
            noise[name].append((math.log2(size), one.noise / one.length.value))
    # Where two lines are the same, they are drawn once.
    length = {"mean": length["mean"], "leave_one_out and none": length["none"]}
    noise["mean and leave_one_out"] = noise.pop("mean")
    del noise["leave_one_out"]
    panels = [
        draw("Length of the mean gradient", "log2 of G", length, labels_below=True),
        draw("Noise over length", "log2 of G", noise),
    ]
    return knob_rows("baseline", measured), panels


def scales(replicates: int) -> Lesson:
    """Dividing by a standard deviation below 1 lengthens the gradient, as a larger learning rate
    would. std also turns it, and the more the larger G is. batch_std turns it at most by a trace.
    """
    return knob_rows("scale", measure_knob("advantage_scale", SCALES, replicates)), []


def question_weights(replicates: int) -> Lesson:
    """The length of each question's own gradient. std lengthens most that of a nearly hopeless and
    that of a nearly solved question, but only in large groups: with two completions, any standard
    deviation but 0 is the same number.
    """
    rewards_Q = policy.expected_rewards(START).tolist()
    rows = [{"question": name} for name in QUESTIONS]
    lines: dict[str, Points] = {}
    for scale in ("std", "batch_std"):
        config = replace(UNBIASED, advantage_scale=scale)
        for size in (2, 64):
            gradients, _ = step_gradients(config, sample_steps(size, replicates))
            lines[scale] = []  # the larger groups come last, and are drawn
            for q, row in enumerate(rows):
                length = compare(gradients[:, q], EXACT[q]).length
                row[f"{scale}, G = {size}"] = length.text(2)
                lines[scale].append((100 * rewards_Q[q], length.value))
    title, unit = "Length of a question's gradient", "expected reward in %, G = 64"
    return rows, [draw(title, unit, lines, top=8.0)]


def averages(replicates: int) -> Lesson:
    """sequence turns the gradient, whatever G is: it gives more weight to the tokens of short
    completions. It is a little less noisy for it. token and constant differ in length, and in
    direction only by a trace in the smallest groups.
    """
    return knob_rows("average", measure_knob("loss_average", AVERAGES, replicates)), []


def dynamic_sampling(replicates: int) -> Lesson:
    """Questions come at random, and spare groups replace those of equal rewards. That lengthens the
    gradient and does not turn it: a group of equal rewards adds nothing to the sum, and those that
    replace it are more of the same.
    """
    rows = []
    for oversampling in (1.0, 1.5, 2.0, 4.0):
        config = replace(UNBIASED, oversampling=oversampling)
        generator = torch.Generator().manual_seed(0)
        shape = (replicates, config.questions_per_step)
        questions_RN = torch.randint(len(QUESTIONS), shape, generator=generator)
        groups = gradient.sample_groups(START, questions_RN, config.group_size, generator)
        kept = gradient.keep_informative(groups, config)
        equal = 100 * kept.have_equal_rewards().double().mean()
        row = {"oversampling": f"{oversampling}", "equal groups kept": f"{equal:.1f} %"}
        gradients, _ = step_gradients(config, kept)
        rows.append(row | compare(gradients, EXACT).cells())
    return rows, []


def kl_estimators(replicates: int) -> Lesson:
    """Two policies, near the reference and far from it. k1 and k3 have the value of the divergence
    (1.000). k2 has its gradient token by token, with the completions taken as given (length and
    noise are relative to this one), and k3 that of the reversed divergence. None has the gradient
    of the divergence of whole completions. k1 pulls nowhere, and near the reference it is by far
    the noisiest.
    """
    rows = []
    for distance in (0.2, 1.0):
        logits_QPV = START + distance * policy.random_table(seed=1)
        groups = sample_steps(UNBIASED.group_size, replicates, logits_QPV)
        # Without rewards the loss is the KL term alone, whatever the ratios are.
        groups = groups._replace(rewards_NG=torch.zeros_like(groups.rewards_NG))
        value = policy.divergence(logits_QPV).item()
        exact = {
            "whole": grad(policy.divergence)(logits_QPV),
            "tokens, reversed": grad(policy.divergence_of_tokens)(logits_QPV, reverse=True),
            "tokens": grad(policy.divergence_of_tokens)(logits_QPV),
        }
        for kind in KL_ESTIMATES:
            config = replace(UNBIASED, beta=1.0, kl=kind)
            gradients, stats = step_gradients(config, groups, logits_QPV)
            row = {"KL": f"{value:.3f}", "estimate": kind}
            row["value"] = mean_of(stats["kl"] * LIMIT / value).text()
            for name, of_divergence in exact.items():
                # The objective has the divergence with a minus.
                one = compare(-gradients, of_divergence / LIMIT)
                row[f"cosine: {name}"] = one.cosine.text()
            rows.append(row | {"length": one.length.text(), "noise": f"{one.noise:.2f}"})
    return rows, []


def inner_updates(replicates: int) -> Lesson:
    """The gradient on the same samples again, after an update along their own gradient, beside the
    exact one there. Before the update (rate 0) every ratio is 1, the clip is idle, and all kinds
    are the same. After a small update a clip of 0.2 is still idle, and stale samples do hardly any
    harm; GSPO's bounds are so close to 1 that they already clip most tokens. After a large one,
    clipped tokens have no gradient, except with detached ratios. What is left points elsewhere: the
    clip is a brake, not a better estimate.
    """
    groups = sample_steps(UNBIASED.group_size, replicates)
    first, _ = step_gradients(UNBIASED, groups)
    rows = []
    for rate in (0, 5, 50):
        updated_RQPV = START + rate * first  # each step's own policy
        exact = vmap(policy.exact_gradient)(updated_RQPV).mean(0)
        for ratio, clip in product(RATIOS, CLIPS):
            if clip == ("0.2" if ratio == "sequence" else "GSPO's"):
                continue  # each clip is meant for its own kind of ratio
            if rate == 0 and clip == "none":
                continue  # the same as with a clip
            low, high = CLIPS[clip]
            config = replace(UNBIASED, ratio=ratio, clip_low=low, clip_high=high)
            gradients, stats = step_gradients(config, groups, updated_RQPV)
            clipped = stats["clip_ratio/low_mean"] + stats["clip_ratio/high_mean"]
            share = 100 * clipped.mean() / stats["weights"].mean()
            row = {"rate": str(rate), "ratio": ratio, "clip": clip}
            row["tokens clipped"] = f"{share:.1f} %"
            rows.append(row | compare(gradients, exact).cells())
    return rows, []
