"""Presets: the published combinations of knobs, and how `--preset` mixes with file and flags."""

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_train import run, vowel_score, weights
from tiny_run import write_run

from common.command_line import PRESETS, parse_arguments
from common.config import Config, Loss, Rewards, Rollout, load_config
from common.errors import InputError

ROOT = Path(__file__).parent.parent
NAMES = sorted(file.stem for file in PRESETS.glob("*.toml"))
HEADINGS = {"rollout": Rollout, "rewards": Rewards, "loss": Loss}
OF_THE_RUN = {"prompts_per_step", "group_size", "max_new_tokens", "temperature"}
OF_THE_RUN |= {"format_weight", "accuracy_weight", "sft_answer"}
"""Fields under these headings that are no variants of the method."""


def tables(name: str) -> dict[str, dict]:
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


def values(name: str) -> dict:
    merged = {}
    for table in tables(name).values():
        merged |= table
    return merged


def parsed(file: Path, *flags: str) -> Config:
    return parse_arguments("", ["--config", str(file), *flags])[0]


def test_a_preset_lies_over_the_file_and_under_the_flags(tmp_path):
    file = tmp_path / "c.toml"
    required = 'model = "m"\ntrain_questions = "q.json"\nrun_dir = "r"\n'
    file.write_text(required + "beta = 0.5\nclip_high = 0.25\nclip_low = 0.15\nsteps = 7\n")
    config = parsed(file, "--clip_high", "0.3", "--preset", "dapo", "--oversampling", "2")
    assert config.beta == 0.0 and config.loss_average == "token"  # the preset's, over the file
    assert (config.clip_high, config.oversampling) == (0.3, 2.0)  # the flags', over the preset
    assert (config.clip_low, config.steps) == (0.15, 7)  # the preset leaves the file's alone
    assert parsed(file).beta == 0.5
    assert load_config(file, {}, PRESETS / "dapo.toml").clip_high == 0.28


def test_preset_grpo_turns_every_knob_back(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        'model = "m"\ntrain_questions = "q.json"\nrun_dir = "r"\ngroup_size = 3\n'
        "oversampling = 2\nlength_penalty = 0.5\ninner_updates = 2\nloss_average = 'token'\n"
        "advantage_baseline = 'leave_one_out'\nadvantage_scale = 'none'\nmask_truncated = true\n"
        "ratio = 'sequence'\nclip_low = 0.1\nclip_high = 0.3\ndual_clip = 3\nkl = 'k2'\n"
        "importance_cap = 2\nbeta = 0.1\n"
    )
    plain = Config(model="m", train_questions="q.json", run_dir="r", group_size=3)
    turned = {
        knob for knob in values("grpo") if getattr(parsed(file), knob) != getattr(plain, knob)
    }
    assert turned == values("grpo").keys()
    assert parsed(file, "--preset", "grpo") == plain


def test_an_unknown_preset_is_one_line_with_the_known_names(tmp_path, capsys):
    with pytest.raises(InputError, match="--preset.*'ppo'") as caught:
        parsed(tmp_path / "c.toml", "--preset", "ppo")
    assert "\n" not in str(caught.value)
    for name in NAMES:
        assert name in str(caught.value)
    with pytest.raises(SystemExit):
        parse_arguments("", ["--help"])
    assert ", ".join(NAMES) in " ".join(capsys.readouterr().out.split())


def test_preset_grpo_holds_every_knob_at_the_configs_default():
    for heading, table in tables("grpo").items():
        defaults = {one.name: one.default for one in fields(HEADINGS[heading])}
        assert table == {n: default for n, default in defaults.items() if n not in OF_THE_RUN}
        for name, value in table.items():
            assert type(value) is type(defaults[name]), name
    assert tables("grpo").keys() == HEADINGS.keys()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "grpo"])
def test_a_preset_names_knobs_of_the_method_and_only_those_that_it_changes(name):
    grpo = tables("grpo")
    for heading, table in tables(name).items():
        assert table.keys() <= grpo[heading].keys()
        unchanged = {key for key, value in table.items() if value == grpo[heading][key]}
        assert not unchanged


def test_every_published_method_has_its_preset():
    assert NAMES == ["cispo", "dapo", "dr_grpo", "grpo", "gspo", "rloo"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_every_preset_fits_every_shipped_config(name, file):
    config = load_config(file, {}, PRESETS / f"{name}.toml")
    for knob, value in values(name).items():
        assert getattr(config, knob) == value


def test_each_preset_trains_and_no_two_learn_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("training.scoring.score", vowel_score)
    settings = {"steps": 1, "learning_rate": 1e-2, "freeze_vision": True}
    config = write_run(tmp_path, test_questions=[], **settings)
    learned = []
    for name in NAMES:
        flags = ["--preset", name, "--run_dir", str(tmp_path / name / "run")]
        assert run(monkeypatch, config, *flags) == 0
        learned.append(torch.cat([w.flatten() for w in weights(tmp_path / name).values()]))
    for i, one in enumerate(learned):
        assert one.isfinite().all()
        assert not any(torch.equal(one, other) for other in learned[:i])
