"""Configs: loading from a file, overrides, and errors that name the key."""

import ast
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from common.command_line import parse_arguments
from common.config import Config, Rewards, config_toml, load_config
from common.errors import InputError
from rewards import RULES

ROOT = Path(__file__).parent.parent
MINIMAL = 'model = "m"\ntrain_questions = "q.json"\nrun_dir = "r"\n'


def written(tmp_path, text):
    (tmp_path / "c.toml").write_text(MINIMAL + text)
    return tmp_path / "c.toml"


def test_the_command_line_overrides_the_file_and_the_file_overrides_the_defaults(tmp_path):
    file = written(tmp_path, "steps = 7\nbeta = 1\ntest_questions = 'one.json'\n")
    config = parse_arguments(
        "", ["--config", str(file), "--beta", "0.5", "--test_questions", "a.json", "b.json"]
    )[0]
    assert (config.steps, config.beta, config.group_size) == (7, 0.5, Config.group_size)
    assert config.test_questions == ("a.json", "b.json")
    assert load_config(file).test_questions == ("one.json",)
    assert load_config(file).beta == 1.0 and isinstance(load_config(file).beta, float)


def test_any_weight_above_0_makes_a_reward_whatever_its_rule_is_called(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Extended(Rewards):
        brevity_weight: float = 0.0

    @dataclass(frozen=True, kw_only=True)
    class ExtendedConfig(Config, Extended):
        pass

    monkeypatch.setattr("common.config.Rewards", Extended)
    values = {"model": "m", "train_questions": "q", "run_dir": "r"}
    values |= {"format_weight": 0.0, "accuracy_weight": 0.0}
    assert ExtendedConfig(**values, brevity_weight=3.0).accuracy_weight == 0
    # Neither no weight at all nor the length penalty alone is a reward.
    for share in (0.0, 0.5):
        with pytest.raises(InputError, match="accuracy_weight .* all other weights are 0"):
            ExtendedConfig(**values, length_penalty=share)


def test_resolved_config_reads_back_equal(tmp_path):
    config = load_config(
        written(
            tmp_path,
            'run_dir2 = ""\n'.replace("run_dir2", "image_dir")
            + 'test_questions = ["a\\"b", "ü"]\n',
        )
    )
    (tmp_path / "again.toml").write_text(config_toml(config))
    assert load_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stepz = 3", "stepz"),
        ("steps = 'three'", "steps must be int"),
        ("steps = 3.5", "steps must be int"),
        ("steps = true", "steps must be int"),
        ("beta = 'x'", "beta must be float"),
        ("test_questions = [1]", "test_questions"),
        ("steps = 0", "steps is 0"),
        ("temperature = 0", "temperature"),
        ("temperature = nan", "temperature"),
        ("beta = -1", "beta"),
        ("clip_low = 1.5", "clip_low"),
        ("dtype = 'float16'", "float32, bfloat16"),
        ("loss_average = 'mean'", "sequence, token, constant"),
        ("max_pixels = 100", "min_pixels"),
        ("device = 'tpu'", "cpu or cuda"),
        ("learning_rate = inf", "must be below inf"),
        ("seed = 0xFFFFFFFFFFFFFFFFFFFF", "at most 63 bits"),
        ("format_weight = 0\naccuracy_weight = 0", "because all other weights are 0"),
        (
            "format_weight = 0\naccuracy_weight = 0\nlength_penalty = 0.2",
            "accuracy_weight is 0.0; it must be above 0, because all other weights are 0",
        ),
        ("warmup_steps = 400", "must be at most steps (300)"),
        ("group_size = 1", "group_size"),
        ("freeze_vision = 1", "freeze_vision must be bool"),
        ("micro_batch_tokens = 0", "micro_batch_tokens"),
        ("device = 'cpu:3'", "cpu or cuda"),
        ("oversampling = 0.5", "oversampling is 0.5; it must be at least 1"),
        (
            "oversampling = 2\nadvantage_baseline = 'none'\nadvantage_scale = 'none'",
            "oversampling is 2.0; it must be 1, because with advantage_baseline = none groups of "
            "equal rewards teach something",
        ),
        ("length_penalty = 1.5", "length_penalty is 1.5; it must be at most 1"),
        ("importance_cap = -1", "importance_cap is -1.0; it must be at least 0"),
        ("importance_cap = 0.5", "importance_cap is 0.5; it must be 0 or at least 1"),
        (
            "importance_cap = 2\nratio = 'sequence'",
            "importance_cap is 2.0; it must be 0 with ratio = sequence, because it weighs single "
            "tokens",
        ),
        ("ratio = 'group'", "ratio is 'group'; it must be one of token, sequence, detached"),
        ("kl = 'k4'", "kl is 'k4'; it must be one of k3, k2, k1"),
        ("advantage_baseline = 'median'", "one of mean, leave_one_out, none"),
        ("advantage_scale = 'max'", "one of std, batch_std, none"),
        ("advantage_baseline = 'none'", "teaches something but has no standard deviation"),
        ("shard = true\noffload_optimizer = true", "it must be false with shard"),
        ("dual_clip = 1", "dual_clip is 1.0; it must be 0 or above 1"),
        ("dual_clip = 0.5", "dual_clip is 0.5; it must be 0 or above 1"),
        ("dual_clip = 3\nratio = 'detached'", "detached, which has no surrogate to bound"),
        ("steps = ", "not TOML"),
    ],
)
def test_an_invalid_config_is_one_line_that_names_the_key(tmp_path, text, named):
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        load_config(written(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "advantage_baseline = 'none'\nadvantage_scale = 'none'",
        "advantage_baseline = 'none'\nadvantage_scale = 'batch_std'",
        "advantage_baseline = 'leave_one_out'",
        "dual_clip = 1.5\nratio = 'sequence'",
        "ratio = 'detached'",
        "ratio = 'sequence'",
        "importance_cap = 1\nratio = 'detached'",
        "importance_cap = 2",
        "oversampling = 1.25\nprompts_per_step = 4",
        "oversampling = 2\nadvantage_baseline = 'leave_one_out'",
        "format_weight = 0\nlength_penalty = 0.2",
    ],
)
def test_combinations_beside_the_refused_ones_are_accepted(tmp_path, text):
    load_config(written(tmp_path, text))


def test_a_dual_clip_of_0_reaches_the_loss_as_none():
    values = {"model": "m", "train_questions": "q", "run_dir": "r"}
    assert Config(**values).objective["dual_clip"] is None
    assert Config(**values, dual_clip=3.0).objective["dual_clip"] == 3.0


def test_spare_questions_are_drawn_for_grpo_and_not_for_sft():
    values = {"model": "m", "train_questions": "q", "run_dir": "r", "oversampling": 1.5}
    assert Config(**values, prompts_per_step=4).questions_per_step == 6
    assert Config(**values, prompts_per_step=4, method="sft").questions_per_step == 4


def test_missing_file_missing_field_and_bad_flags_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.toml: can't read the config"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "c.toml").write_text('model = "m"\nrun_dir = "r"')
    with pytest.raises(InputError, match="train_questions is missing"):
        load_config(tmp_path / "c.toml")
    file = written(tmp_path, "")
    for flags, named in (
        (["--stepz", "3"], "stepz"),
        (["--steps", "three"], "steps"),
        (["--step", "3"], "step"),
        (["--seed", "9" * 30], "must be below 9,223"),
        (["--freeze_vision", "yes"], "freeze_vision"),
    ):
        with pytest.raises(InputError, match=named):
            parse_arguments("", ["--config", str(file), *flags])[0]


def test_booleans_are_written_as_in_the_file(tmp_path):
    file = written(tmp_path, "freeze_vision = true")
    assert parse_arguments("", ["--config", str(file)])[0].freeze_vision is True
    assert (
        parse_arguments("", ["--config", str(file), "--freeze_vision", "false"])[0].freeze_vision
        is False
    )
    assert parse_arguments("", ["--config", str(file), "--activation_checkpointing", "true"])[
        0
    ].activation_checkpointing


def test_help_shows_the_docstring_of_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments("What it does.", ["--help"])
    # The help text is wrapped, also at hyphens.
    shown_help = re.sub(r"\s", "", capsys.readouterr().out)
    assert stopped.value.code == 0
    source = (ROOT / "common" / "config.py").read_text()
    for field in fields(Config):
        (words,) = re.findall(
            rf'^    {field.name}: .*\n    """((?:.|\n)+?)"""$', source, flags=re.MULTILINE
        )
        assert re.sub(r"\s", "", words) in shown_help, field.name


def test_every_field_is_used_and_every_shipped_config_loads():
    read = set()
    for file in [
        ROOT / "train.py",
        *(ROOT / "grpo").glob("*.py"),
        *(ROOT / "data").glob("*.py"),
        *(ROOT / "training").glob("*.py"),
        *(ROOT / "evaluation").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name | ast.Attribute)
                and getattr(node.value, "id", getattr(node.value, "attr", "")) in ("config", "self")
            ):
                read.add(node.attr)
    read |= {f"{rule}_weight" for rule in RULES}  # read by name in training/scoring.py
    config = Config(model="m", train_questions="q", run_dir="r")
    if "objective" in read:
        read |= config.objective.keys()  # the keyword arguments of grpo_loss
    if "questions_per_step" in read:
        read |= {"oversampling"}
    assert {field.name for field in fields(Config)} <= read
    configs = list((ROOT / "configs").glob("*.toml"))
    assert configs
    for file in configs:
        load_config(file)


def test_the_config_for_24_gb_differs_from_the_papers_only_in_memory_and_speed():
    paper, small = (
        load_config(ROOT / "configs" / f"{name}.toml")
        for name in ("medvlm_r1_2b", "medvlm_r1_2b_24gb")
    )
    different = {
        field.name
        for field in fields(Config)
        if getattr(paper, field.name) != getattr(small, field.name)
    }
    may_change = {one.name for one in fields(Config) if one.metadata["may_change"]}
    assert different <= may_change and "offload_optimizer" in different


def test_a_key_may_be_under_its_heading_and_an_unknown_heading_is_an_unknown_key(tmp_path):
    file = written(tmp_path, "[loss]\nbeta = 0.5\n[rollout]\ngroup_size = 3\n")
    assert (load_config(file).beta, load_config(file).group_size) == (0.5, 3)
    with pytest.raises(InputError, match="unknown key 'losses'"):
        load_config(written(tmp_path, "[losses]\nbeta = 0.5\n"))


@pytest.mark.parametrize(
    ("prompts", "oversampling", "questions"),
    [(4, 1.0, 4), (1, 1.5, 2), (3, 1.5, 5), (4, 1.1, 5), (10, 1.1, 11), (8, 1.5, 12)],
)
def test_the_questions_of_a_step_are_rounded_up(prompts, oversampling, questions):
    config = Config(
        model="m",
        train_questions="q.json",
        run_dir="r",
        prompts_per_step=prompts,
        oversampling=oversampling,
    )
    assert config.questions_per_step == questions
    assert replace(config, method="sft").questions_per_step == prompts
