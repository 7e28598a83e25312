"""The study from its trials to its page, with a tiny base, few steps and four of its arms."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny_run import write_run

import train
from common.errors import InputError
from common.files import read_json_lines
from miniature.study import page, runs, tables
from miniature.study.__main__ import run_study
from miniature.study.arms import ARMS as ALL_ARMS
from miniature.study.arms import SHIPPED, TRIAL_SEED, Base

TYPES = tables.ALL
SUBSETS = ("MR (Mag-netic Resonance Imaging)", "CT(Computed Tomography)", "X-Ray")
BY_FOLDER = {arm.folder: arm for arm in ALL_ARMS}
ARMS = tuple(BY_FOLDER[name] for name in ("sft-tags", "grpo", "sft-grpo", "grpo-blank"))
BASES = (SHIPPED._replace(seeds=(1, 2)), Base("second", 8, (1,)))


def test_a_program_that_fails_is_one_line_with_its_log(tmp_path):
    log = tmp_path / "x" / "run.log"
    runs.do("nothing", [runs.Command(("-c", "print(1)"), log)])
    with pytest.raises(InputError, match=r"SystemExit|no way \(see .*run.log\)"):
        runs.do("failing", [runs.Command(("-c", "raise SystemExit('no way')"), log)])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study, the commands that it took, and its folder."""
    folder = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    write_files(folder)
    commands = []

    def in_this_process(name, jobs):
        for job in jobs:
            if isinstance(job, runs.Answering):
                job.work()
                continue
            commands.append(job.arguments)
            patch.setattr(sys, "argv", list(job.arguments))
            assert train.main() == 0

    for module in (runs, tables, page, sys.modules[run_study.__module__]):
        for name, value in {
            "ARMS": ARMS,
            "BASES": BASES,
            "SHIPPED": BASES[0],
            "RATES": ("1e-3", "1e-2"),
            "LENGTHS": (2, 4),
            "CONTROLS": ARMS[3:],
            "CURVES": {"grpo": "blue", "sft-tags": "orange"},
            "do": in_this_process,
        }.items():
            if hasattr(module, name):
                patch.setattr(module, name, value)
    patch.setattr(sys, "argv", ["study"])
    run_study()
    first = list(commands)
    # So small a model is never right: some answers are made so, for the page to have numbers.
    for seed, file in enumerate(sorted(Path("runs").rglob("answers.jsonl"))):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows[seed % 3 :: 2 + seed % 2]:
            row["letter"] = row["ground_truth"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    patch.setattr(sys, "argv", ["study"])
    run_study()
    assert commands == first, "a finished study runs nothing again"
    yield runs.Study(Path("runs/study")), first, folder
    patch.undo()


def write_files(folder: Path) -> None:
    """Configs, base and questions where the study looks for them, and an empty page."""
    write_run(folder, validate_every=2)
    rows = json.loads((folder / "questions" / "test.json").read_text())
    rows += json.loads((folder / "questions" / "train.json").read_text())
    for at, row in enumerate(rows):
        options = ["MRI", "CT", "Normal"]
        row |= {"subset": SUBSETS[at % 3], "question_type": TYPES[at // 3 % 4], "options": options}
        row["answer"] = options[at % 2]
    build = folder / "build" / "miniature"
    shutil.copytree(folder / "questions", build)
    for name, chosen in (("train", rows[12:]), ("validation", rows[:12]), ("test", rows[:12])):
        (build / f"{name}.json").write_text(json.dumps(chosen))
    text = (folder / "config.toml").read_text()
    text = text.replace(str(folder / "questions"), "build/miniature")
    text += 'validation_questions = ["build/miniature/validation.json"]\n'
    (folder / "configs").mkdir()
    (folder / "configs" / "miniature.toml").write_text(text)
    (folder / "configs" / "miniature_sft.toml").write_text(text + 'method = "sft"\n')
    for base in ("miniature/base", "runs/study/bases/second"):
        shutil.copytree(folder / "base", folder / base)
        number = 50 + len(base)
        card = f"# Card\n| made to think: right | {number} | 2 | 3 | 4 | 5 | 6 |\n| greedy | 7 |\n"
        (folder / base / "README.md").write_text(card)
    (folder / "docs").mkdir()
    names = ["settings", "trials", "accuracy", "paired", "modality", "types", "sight", "shortcuts"]
    names.append("bases")
    markers = ["# Study", "by hand"]
    for name in (*names, "second base"):
        markers += [f"<!-- {name}: written by a command -->", "old", f"<!-- {name}: end -->"]
    (folder / "docs" / "study.md").write_text("\n".join(markers) + "\n")


def flag(command, name):
    return command[command.index(f"--{name}") + 1]


def test_the_choice_is_the_trial_with_the_most_right_and_of_equals_the_shorter(study):
    made, _, _ = study
    for arm in ARMS:
        scores = {}
        for steps in (2, 4):
            for rate in ("1e-3", "1e-2"):
                scores[steps, rate], total = runs.validated(made.trial_dir(arm, rate))[steps]
        chosen = made.choice(arm)
        assert chosen.right == max(scores.values()) and chosen.total == total
        best = [key for key, right in scores.items() if right == chosen.right]
        assert (chosen.steps, chosen.rate) == best[0]


def test_each_run_has_its_arms_settings_and_no_test_seed_is_that_of_a_trial(study):
    made, commands, _ = study
    trials = [command for command in commands if "/trials/" in flag(command, "run_dir")]
    tests = [command for command in commands if command not in trials]
    assert len(trials) == len(ARMS) * 2 and len(tests) == len(ARMS) * (2 + 1)
    assert {flag(command, "seed") for command in trials} == {str(TRIAL_SEED)}
    assert str(TRIAL_SEED) not in {flag(command, "seed") for command in tests}
    for command in tests:
        arm = BY_FOLDER[Path(flag(command, "run_dir")).parent.name]
        chosen = made.choice(arm)
        assert flag(command, "learning_rate") == chosen.rate
        assert flag(command, "steps") == str(chosen.steps)
        assert ("blank" in command) == (arm.folder == "grpo-blank")
        if arm.begins_with:
            assert f"/{arm.begins_with.folder}/" in flag(command, "model")


def test_test_questions_are_answered_by_every_model_and_by_no_run(study):
    made, commands, folder = study
    assert all(
        command[command.index("--test_questions") + 1 :][:1] != ["build"] for command in commands
    )
    files = sorted(Path("runs/study").rglob("answers.jsonl"))
    assert len(files) == 2 + len(ARMS) * 3
    for file in files:
        assert len(file.read_text().splitlines()) == 12


def test_the_page_holds_the_rates_of_the_answers_between_its_markers(study):
    made, _, folder = study
    text = Path("docs/study.md").read_text()
    assert text.startswith("# Study\nby hand\n") and "old" not in text
    rates = []
    for seed in (1, 2):
        rows = read_json_lines(
            made.run_dir(BASES[0], BY_FOLDER["grpo"], seed) / "answers.jsonl", ""
        )
        right = [r["letter"] == r["ground_truth"] for _, r in rows if r["modality"] == "CT"]
        rates.append(100 * sum(right) / len(right))
    accuracy = text.partition("<!-- accuracy")[2].partition("<!-- accuracy: end")[0]
    (line,) = [line for line in accuracy.splitlines() if line.startswith("| GRPO |")]
    assert line.split("|")[3].split()[0] == f"{sum(rates) / 2:.1f}"
    bases = text.partition("<!-- bases")[2].partition("<!-- bases: end")[0]
    shipped = f"| shipped | made to think | {50 + len('miniature/base')} | 2 | 3 | 4 | 5 | 6 |"
    assert shipped in bases and "| second | made to think |" in bases and "greedy" not in bases
    svg = Path("docs/study.svg").read_text()
    assert svg.count("<polyline") == 2 * 3 and "SFT, letters in tags" in svg
