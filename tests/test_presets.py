"""Presets: the published combinations of knobs, how `--preset` mixes with file and flags, and the
miniature trained with each.
"""

import json
import shutil
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_train import run, vowel_score, weights
from tiny_run import write_run

import train
from common.command_line import PRESETS, parse_arguments
from common.config import Config, Loss, Rewards, Rollout, load_config
from common.errors import InputError
from evaluation.report.curves import read_metrics
from miniature.study import presets as study

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


def all_values(name: str) -> dict:
    """Every knob with the preset."""
    return values("grpo") | values(name)


def parsed(file: Path, *flags: str) -> Config:
    return parse_arguments("", ["--config", str(file), *flags])[0]


def test_a_preset_lies_over_the_file_and_under_the_flags(tmp_path):
    file = tmp_path / "c.toml"
    required = 'model = "m"\ntrain_questions = "q.json"\nrun_dir = "r"\n'
    file.write_text(required + "beta = 0.5\nclip_high = 0.25\nclip_low = 0.15\nsteps = 7\n")
    config = parsed(file, "--clip_high", "0.3", "--preset", "dapo", "--oversampling", "2")
    assert config.beta == 0.0 and config.loss_average == "token"  # the preset's, over the file
    assert (config.clip_high, config.oversampling) == (0.3, 2.0)  # the flags', over the preset
    assert config.clip_low == 0.2  # the preset's too, though dapo.toml does not name it
    assert config.steps == 7  # no knob of the method
    assert parsed(file).beta == 0.5


def test_of_several_preset_files_the_last_wins_and_without_any_the_file_stands(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\ntrain_questions = "q.json"\nrun_dir = "r"\nclip_low = 0.15\n')
    grpo, dapo = PRESETS / "grpo.toml", PRESETS / "dapo.toml"
    highs = [load_config(file, {}, files).clip_high for files in ([grpo, dapo], [dapo, grpo])]
    assert highs == [0.28, 0.2]
    assert load_config(file, {}, [dapo]).clip_low == load_config(file).clip_low == 0.15
    assert load_config(file, {"clip_high": 0.5}, [grpo, dapo]).clip_high == 0.5


TURNED = (
    "oversampling = 2\nlength_penalty = 0.5\ninner_updates = 3\nloss_average = 'token'\n"
    "advantage_baseline = 'leave_one_out'\nadvantage_scale = 'batch_std'\nbeta = 0.1\n"
    "mask_truncated = true\nclip_low = 0.1\nclip_high = 0.3\nkl = 'k1'\n"
)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_leaves_none_of_the_files_knobs(tmp_path, name):
    file = tmp_path / "c.toml"
    required = 'model = "m"\ntrain_questions = "q.json"\nrun_dir = "r"\ngroup_size = 3\n'
    plain = Config(model="m", train_questions="q.json", run_dir="r", group_size=3)
    turned = set()
    # Not all knobs can be turned at once.
    for others in ("ratio = 'sequence'\ndual_clip = 3\n", "importance_cap = 2\n"):
        file.write_text(required + TURNED + others)
        own = parsed(file)
        turned |= {knob for knob in values("grpo") if getattr(own, knob) != getattr(plain, knob)}
        assert parsed(file, "--preset", name) == replace(plain, **all_values(name))
    assert turned == values("grpo").keys()


def test_a_preset_for_sft_is_refused_in_one_line(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\ntrain_questions = "q.json"\nrun_dir = "r"\nmethod = "sft"\n')
    with pytest.raises(InputError, match="--preset .* GRPO, but .* method = sft") as caught:
        parsed(file, "--preset", "grpo")
    assert "\n" not in str(caught.value)
    assert parsed(file, "--preset", "grpo", "--method", "grpo").method == "grpo"
    with pytest.raises(InputError, match="method = sft"):
        parsed(file, "--method", "sft", "--preset", "dapo", "--dry-run")


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


def test_the_presets_hold_the_values_of_their_papers():
    """Read once more from the papers; where these leave a value open, from the preset's comment."""
    two = {"inner_updates": 2, "beta": 0.0}
    soft = {"oversampling": 1.5, "length_penalty": 0.2}
    unscaled = {"advantage_scale": "none", "loss_average": "constant"}
    published = {
        "grpo": {},
        "dr_grpo": unscaled | {"beta": 0.0},  # arXiv 2503.20783, section 3.2 and its code
        "dapo": two | soft | {"clip_high": 0.28, "loss_average": "token"},  # arXiv 2503.14476, 4.1
        # arXiv 2507.18071, section 5.1
        "gspo": two | {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        # arXiv 2506.13585, equation 4, without a lower bound; the upper one of arXiv 2510.13786
        "cispo": two
        | {"ratio": "detached", "clip_low": 1.0, "clip_high": 4.0, "loss_average": "token"},
        "rloo": unscaled | {"advantage_baseline": "leave_one_out", "kl": "k2"},  # arXiv 2402.14740
    }
    defaults = values("grpo")
    for name in NAMES:
        changed = {knob: x for knob, x in values(name).items() if x != defaults[knob]}
        assert changed == published[name], name


def test_every_published_method_has_its_preset():
    assert NAMES == ["cispo", "dapo", "dr_grpo", "grpo", "gspo", "rloo"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_every_preset_fits_every_shipped_config_of_grpo_and_is_refused_by_those_of_sft(name, file):
    if load_config(file).method == "sft":
        with pytest.raises(InputError, match="method = sft"):
            parsed(file, "--preset", name)
        return
    config = parsed(file, "--preset", name)
    assert config == replace(load_config(file), **all_values(name))


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


@pytest.fixture
def tiny_study(tmp_path, monkeypatch) -> Path:
    """A folder for the study's runs, which have 2 steps and 2 seeds."""
    config = write_run(tmp_path, test_questions=[], validation_fraction=0.4, freeze_vision=True)
    monkeypatch.setattr("training.scoring.score", vowel_score)
    monkeypatch.setattr(study, "GRPO_CONFIG", str(config))
    monkeypatch.setattr(study, "SEEDS", (1, 2))
    monkeypatch.setattr(study, "STEPS", 2)
    monkeypatch.setattr(study, "SHOWN", 1)
    return tmp_path / "runs"


def page_of(folder: Path) -> Path:
    """A copy of the page that the study writes into."""
    folder.mkdir()
    return Path(shutil.copy(ROOT / "docs" / "grpo.md", folder))


def test_the_study_trains_each_preset_writes_its_table_and_does_nothing_twice(
    tiny_study, tmp_path, monkeypatch
):
    page, commands = page_of(tmp_path / "docs"), []

    def in_this_process(name, jobs):
        for job in jobs:
            commands.append(job.arguments)
            monkeypatch.setattr(sys, "argv", list(job.arguments))
            assert train.main() == 0

    monkeypatch.setattr(study, "do", in_this_process)
    arguments = ["presets", "--out", str(tiny_study), "--docs", str(page.parent)]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        study.train_presets()
        assert len(commands) == 2 * len(NAMES)
    trained = {(command[4], command[6]) for command in commands}
    assert trained == {(name, seed) for name in NAMES for seed in ("1", "2")}
    begin, end = (f"<!-- {study.MARKERS}: {word} -->\n" for word in ("written by a command", "end"))
    written = page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert written == study.table(tiny_study)
    assert [row.split("`")[1] for row in written.splitlines()[2:]] == NAMES
    for row, name in zip(written.splitlines()[2:], NAMES, strict=True):
        rewards = []
        for seed in (1, 2):
            metrics = read_metrics(tiny_study / name / str(seed) / "metrics.jsonl")
            rewards.append([step["reward"] for step in metrics])
        (first, last), (again, last_again) = rewards
        means = f"{(first + again) / 2:.2f} to {(last + last_again) / 2:.2f}"
        assert f"| {means} ({min(last, last_again):.2f} to {max(last, last_again):.2f}) |" in row


def test_only_finished_runs_are_left_out_of_the_studys_jobs(tiny_study):
    assert len(study.jobs(tiny_study)) == 2 * len(NAMES)
    finished, begun = tiny_study / "dapo" / "2", tiny_study / "gspo" / "1"
    for folder in (finished, begun):
        folder.mkdir(parents=True)
    (finished / "summary.json").write_text("{}")
    (begun / "metrics.jsonl").write_text("")
    left = [job.log for job in study.jobs(tiny_study)]
    assert len(left) == 2 * len(NAMES) - 1
    assert tiny_study / "dapo" / "2.log" not in left and tiny_study / "gspo" / "1.log" in left


def test_the_studys_table_shows_changed_knobs_and_means_over_seeds(tiny_study):
    for name in NAMES:
        for seed, rewards, right in ((1, (0.5, 1.0), 1), (2, (0.75, 1.5), 3)):
            folder = tiny_study / name / str(seed)
            folder.mkdir(parents=True)
            clips = {"clip_ratio/low_mean": 0.01, "clip_ratio/high_mean": seed / 100}
            spares = {"replaced_groups": seed / 2} if name == "dapo" else {}
            steps = []
            for step, reward in enumerate(rewards):
                steps.append({"step": step, "reward": reward, **clips, **spares})
            validation = [{"step": 0, "right": 0, "total": 10}]
            validation.append({"step": 1, "right": right, "total": 10})
            for file, written in (("metrics", steps), ("validation", validation)):
                text = "".join(json.dumps(row) + "\n" for row in written)
                (folder / f"{file}.jsonl").write_text(text)
    numbers = "| 0.62 to 1.25 (1.00 to 1.50) | 2.5 % | 0.00 | 20.0 (5.7 to 51.0) |"
    by_name = dict(zip(NAMES, study.table(tiny_study).splitlines()[2:], strict=True))
    assert by_name["grpo"] == f"| `grpo` | the defaults {numbers}"
    turned = "`advantage_scale` none, `loss_average` constant, `beta` 0.0"
    assert by_name["dr_grpo"] == f"| `dr_grpo` | {turned} {numbers}"
    assert " | 2.5 % | 0.75 | " in by_name["dapo"]


def test_a_page_without_markers_is_refused_before_the_study_trains(
    tiny_study, tmp_path, monkeypatch
):
    page = page_of(tmp_path / "docs")
    page.write_text(page.read_text(encoding="utf-8").replace(f"<!-- {study.MARKERS}: end", "<!--"))
    monkeypatch.setattr(study, "do", lambda *_: pytest.fail("trained"))
    arguments = ["presets", "--out", str(tiny_study), "--docs", str(page.parent)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(InputError, match="has no markers"):
        study.train_presets()
