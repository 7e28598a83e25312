"""What each knob of the method does to the gradient.

A lesson is a function that measures; its docstring is printed under its table. All start from the
setting `UNBIASED`, whose expected gradient is the exact one, and turn one knob of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
from torch.func import grad, vmap

from common.config import Config
from grpo.advantages import BASELINES, SCALES
from grpo.loss import AVERAGES, KL_ESTIMATES

from . import gradient, policy
from .gradient import Comparison, Groups, compare, exact_gradient, standard_error, step_gradients
from .policy import LIMIT, QUESTIONS

START = policy.start_table()
EXACT = exact_gradient(START)
# The fields that a run needs and a table of logits does not are never read.
TABLE = Config(
    run_dir="none",
    model="a table of logits",
    train_questions="those of policy.py",
    prompts_per_step=len(QUESTIONS),
    group_size=8,
    max_new_tokens=LIMIT,
)
UNBIASED = replace(
    TABLE,
    advantage_baseline="leave_one_out",
    advantage_scale="none",
    loss_average="constant",
    beta=0.0,
)
GROUP_SIZES = (2, 4, 8, 64)
MEASURES = ("cosine", "length", "noise", "noise / length")
RATIOS_AND_CLIPS = {
    ("token", "none"): (1.0, 1e9),
    ("token", "0.2"): (0.2, 0.2),
    ("sequence", "none"): (1.0, 1e9),
    ("sequence", "GSPO's"): (3e-4, 4e-4),
    ("detached", "none"): (1.0, 1e9),
    ("detached", "0.2"): (0.2, 0.2),
}
"""Kind of ratio and name of the clip -> clip_low and clip_high. (1.0, 1e9) bounds no ratio."""

Points = list[tuple[float, float]]
Measured = dict[tuple[int, str], Comparison]


class Panel(NamedTuple):
    """Lines of the picture: label -> points."""

    title: str
    unit: str
    lines: Mapping[str, Points]
    top: float = 0.0  # of the y axis; 0 ends it above all points
    labels_below: bool = False  # at the bottom right, where no line ends, and not at the top


class Lesson(NamedTuple):
    """A table, and its panels of the picture."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    panels: Sequence[Panel] = ()


def with_error(value: float, error: float, digits: int = 3) -> str:
    return "none" if math.isnan(value) else f"{value:.{digits}f} ± {error:.{digits}f}"


def cells(measured: Comparison) -> tuple[str, ...]:
    """A row's cells under MEASURES."""
    cosine = with_error(measured.cosine, measured.cosine_error, 4)
    length = with_error(measured.length, measured.length_error)
    return cosine, length, f"{measured.noise:.2f}", f"{measured.noise / measured.length:.2f}"


def sample_steps(group_size: int, replicates: int, logits_QPV: torch.Tensor = START) -> Groups:
    """Steps that ask each question once. Larger groups have less noise: fewer steps will do."""
    questions_RN = torch.arange(len(QUESTIONS)).expand(replicates * 8 // max(8, group_size), -1)
    # Every knob gets the same samples: the rows of a table don't differ by luck.
    generator = torch.Generator().manual_seed(0)
    return gradient.sample_groups(logits_QPV, questions_RN, group_size, generator)


def measure_knob(settings: Mapping[str, Config], replicates: int) -> Measured:
    """The gradient for each group size and each setting of a knob."""
    measured = {}
    for size in GROUP_SIZES:
        groups = sample_steps(size, replicates)
        for name, config in settings.items():
            gradients, _ = step_gradients(config, groups, START)
            measured[size, name] = compare(gradients, EXACT)
    return measured


def knob_lesson(knob: str, measured: Measured, panels: Sequence[Panel] = ()) -> Lesson:
    rows = [(str(size), name, *cells(one)) for (size, name), one in measured.items()]
    return Lesson(("G", knob, *MEASURES), rows, panels)


def questions(replicates: int) -> Lesson:
    """The four questions. A group whose rewards are all equal teaches nothing (unless there is no
    baseline). For a nearly hopeless or nearly solved question that is most groups, unless they are
    large.
    """
    rewards_Q = policy.expected_rewards(START)
    lengths_Q = policy.probabilities(START) @ policy.MASK_OT.sum(-1).double()
    rows = [[name] for name in QUESTIONS]
    lines: dict[str, Points] = {name: [] for name in QUESTIONS}
    for q, row in enumerate(rows):
        row += [f"{rewards_Q[q]:.3f}", f"{lengths_Q[q]:.2f}", f"{EXACT[q].norm():.4f}"]
    for size in GROUP_SIZES:
        share_Q = sample_steps(size, replicates).have_equal_rewards().double().mean(0).tolist()
        for row, points, share in zip(rows, lines.values(), share_Q, strict=True):
            row.append(f"{100 * share:.1f} %")
            points.append((math.log2(size), share))
    equal = [f"equal, G = {size}" for size in GROUP_SIZES]
    panel = Panel("Groups with equal rewards", "log2 of G", lines, top=1.0)
    head = ("question", "expected reward", "mean length", "gradient", *equal)
    return Lesson(head, rows, [panel])


def baselines(replicates: int) -> Lesson:
    """No baseline turns the gradient. mean shortens it, and its noise alike, by (G - 1) / G. With
    rewards of 0 and 1, doing without is no noisier in small groups, whose mean is a noisy number
    itself. With 1 added to all rewards (as for a format that is always right) it is far noisier;
    mean and leave_one_out would not change.
    """
    settings = {name: replace(UNBIASED, advantage_baseline=name) for name in BASELINES}
    measured = measure_knob(settings, replicates)
    for size in GROUP_SIZES:
        groups = sample_steps(size, replicates)
        gradients, _ = step_gradients(settings["none"], groups, START, bonus=1.0)
        measured[size, "none, rewards + 1"] = compare(gradients, EXACT)
    measured = dict(sorted(measured.items(), key=itemgetter(0)))
    length: dict[str, Points] = {name: [] for _, name in measured}
    noise: dict[str, Points] = {name: [] for _, name in measured}
    for (size, name), one in measured.items():
        length[name].append((math.log2(size), one.length))
        noise[name].append((math.log2(size), one.noise / one.length))
    # Where two lines are the same, they are drawn once.
    length = {"mean": length["mean"], "leave_one_out and none": length["none"]}
    noise["mean and leave_one_out"] = noise.pop("mean")
    del noise["leave_one_out"]
    panels = (
        Panel("Length of the mean gradient", "log2 of G", length, labels_below=True),
        Panel("Noise over length", "log2 of G", noise),
    )
    return knob_lesson("baseline", measured, panels)


def scales(replicates: int) -> Lesson:
    """Dividing by a standard deviation below 1 lengthens the gradient, as a larger learning rate
    would. std also turns it, and the more the larger G is. batch_std turns it at most by a trace.
    """
    settings = {name: replace(UNBIASED, advantage_scale=name) for name in SCALES}
    return knob_lesson("scale", measure_knob(settings, replicates))


def question_weights(replicates: int) -> Lesson:
    """The length of each question's own gradient. std lengthens most that of a nearly hopeless and
    that of a nearly solved question, but only in large groups: with two completions, any standard
    deviation but 0 is the same number.
    """
    rewards_Q = policy.expected_rewards(START).tolist()
    head, rows = ["question"], [[name] for name in QUESTIONS]
    lines: dict[str, Points] = {}
    for scale in ("std", "batch_std"):
        for size in (2, 64):
            config = replace(UNBIASED, advantage_scale=scale)
            gradients, _ = step_gradients(config, sample_steps(size, replicates), START)
            head.append(f"{scale}, G = {size}")
            lines[scale] = []  # the larger groups come last, and are drawn
            for q, row in enumerate(rows):
                one = compare(gradients[:, q], EXACT[q])
                row.append(with_error(one.length, one.length_error, 2))
                lines[scale].append((100 * rewards_Q[q], one.length))
    title, unit = "Length of a question's gradient", "expected reward in %, G = 64"
    return Lesson(head, rows, [Panel(title, unit, lines, top=8.0)])


def averages(replicates: int) -> Lesson:
    """sequence turns the gradient, whatever G is: it gives more weight to the tokens of short
    completions. It is a little less noisy for it. token and constant differ in length, and in
    direction only by a trace in the smallest groups.
    """
    settings = {name: replace(UNBIASED, loss_average=name) for name in AVERAGES}
    return knob_lesson("average", measure_knob(settings, replicates))


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
        gradients, _ = step_gradients(config, kept, START)
        rows.append((f"{oversampling}", f"{equal:.1f} %", *cells(compare(gradients, EXACT))))
    return Lesson(("oversampling", "equal groups kept", *MEASURES), rows)


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
        exact = policy.divergence(logits_QPV, START).item()
        completions = grad(policy.divergence)(logits_QPV, START) / LIMIT
        tokens = grad(policy.divergence_of_tokens)(logits_QPV, START) / LIMIT
        reverse = grad(policy.divergence_of_tokens)(logits_QPV, START, reverse=True) / LIMIT
        for kind in KL_ESTIMATES:
            loss = partial(gradient.kl_loss, ref_QPV=START, kind=kind)
            gradients, stats = gradient.loss_gradients(loss, logits_QPV, groups)
            values_R = stats["kl"] * LIMIT / exact
            row = [
                f"{exact:.3f}",
                kind,
                with_error(values_R.mean().item(), standard_error(values_R)),
            ]
            compared = [compare(gradients, one) for one in (completions, reverse, tokens)]
            row += [with_error(one.cosine, one.cosine_error) for one in compared]
            by_token = compared[-1]
            row += [with_error(by_token.length, by_token.length_error), f"{by_token.noise:.2f}"]
            rows.append(row)
    cosines = ("cosine: whole", "cosine: tokens, reversed", "cosine: tokens")
    return Lesson(("KL", "estimate", "value", *cosines, "length", "noise"), rows)


def inner_updates(replicates: int) -> Lesson:
    """The gradient on the same samples again, after an update along their own gradient, beside the
    exact one there. Before the update (rate 0) every ratio is 1, the clip is idle, and all kinds
    are the same. After a small update a clip of 0.2 is still idle, and stale samples do hardly any
    harm; GSPO's bounds are so close to 1 that they already clip most tokens. After a large one,
    clipped tokens have no gradient, except with detached ratios. What is left points elsewhere: the
    clip is a brake, not a better estimate.
    """
    groups = sample_steps(UNBIASED.group_size, replicates)
    first, _ = step_gradients(UNBIASED, groups, START)
    rows = []
    for rate in (0, 5, 50):
        updated_RQPV = START + rate * first  # each step's own policy
        exact = vmap(exact_gradient)(updated_RQPV).mean(0)
        for (ratio, clip), (low, high) in RATIOS_AND_CLIPS.items():
            if rate == 0 and clip == "none":
                continue  # the same as with a clip
            config = replace(UNBIASED, ratio=ratio, clip_low=low, clip_high=high)
            gradients, stats = step_gradients(config, groups, START, updated_RQPV)
            clipped = stats["clip_ratio/low_mean"] + stats["clip_ratio/high_mean"]
            share = 100 * clipped.mean() / stats["weights"].mean()
            row = (str(rate), ratio, clip, f"{share:.1f} %")
            rows.append((*row, *cells(compare(gradients, exact))))
    return Lesson(("rate", "ratio", "clip", "tokens clipped", *MEASURES), rows)
