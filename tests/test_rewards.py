"""The rewards score as a strict but fair grader would; no completion can cheat or stall them."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rewards import (
    LETTERS,
    RULES,
    Verdict,
    accuracy_reward,
    answer_text,
    format_reward,
    parse_letter,
    read_letter,
    score,
)
from rewards.letter import LONGEST_ANSWER, excerpt

ROOT = Path(__file__).resolve().parent.parent
RADIOLOGY = ROOT.parent / "shared" / "radiology"


def answered(answer: str) -> str:
    return f"<think>The left lung is clear.</think>\n<answer>{answer}</answer>"


def shared(name: str) -> str:
    path = RADIOLOGY / name
    if not path.exists():
        pytest.skip(
            f"{path} is absent: the real completions and questions are not part of the repository"
        )
    return path.read_text(encoding="utf-8")


def command(
    *arguments: str, stdin: str = "", encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rewards", *arguments],
        input=stdin,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=60,
    )


# Format


@pytest.mark.parametrize(
    "completion",
    [
        "<think>t</think><answer>B</answer>",
        "\n <think>\nt\n</think>\n\n<answer> B </answer>\n ",
        "<think>1 < 2 > 0, <b>so</b> it is </thinking> about</think> <answer>B) Heart</answer>",
        "<think>.</think><answer>no letter here</answer>",
    ],
)
def test_format_takes_one_think_block_then_one_answer_block(completion: str) -> None:
    assert format_reward(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " ",
        "B",
        "<answer>B</answer>",
        "<think>t</think>",
        "<think>t</think>B",
        "<think></think><answer>B</answer>",
        "<think> \n</think><answer>B</answer>",
        "<think>t</think><answer> </answer>",
        "<think>\u200b\ufeff</think><answer>B</answer>",
        "<think>\x00</think><answer>B</answer>",
        "So: <think>t</think><answer>B</answer>",
        "<think>t</think> so <answer>B</answer>",
        "<think>t</think><answer>B</answer>.",
        "<think>t</think><answer>B</answer><|im_end|>",
        "<answer>B</answer><think>t</think>",
        "<think>t<answer>B</answer></think>",
        "<think>t</think><think>u</think><answer>B</answer>",
        "<think>t</think><answer>B</answer><answer>B</answer>",
        "<think><think>t</think></think><answer>B</answer>",
        "<think>t</think><answer><answer>B</answer></answer>",
        "<think>t</think><answer><think>B</answer>",
        "<think>in <answer>...</answer> tags</think><answer>B</answer>",
        "<think>t</think><answer>B",
        "<think>t<answer>B</answer>",
        "<THINK>t</THINK><answer>B</answer>",
        "<think>t</think><ANSWER>C</ANSWER><answer>B</answer>",
        "<think >t</think><answer>B</answer>",
        "<think>t</think><answer>B</answer>" * 2,
    ],
)
def test_format_refuses_anything_else(completion: str) -> None:
    assert format_reward(completion) == 0.0


# Accuracy


@pytest.mark.parametrize("answer", ["B", " B ", "\nB\n", "b", "\u200bB\ufeff"])
def test_the_right_letter_alone_scores_one(answer: str) -> None:
    assert accuracy_reward(answered(answer), "B") == 1.0
    assert accuracy_reward(answered(answer), "A") == 0.0


def test_surrounding_white_space_does_not_count_towards_the_longest_answer() -> None:
    assert parse_letter(" " * LONGEST_ANSWER + "B\n") == "B"
    assert parse_letter("B, " + "x" * (LONGEST_ANSWER - 3)) == "B"
    assert parse_letter("B, " + "x" * (LONGEST_ANSWER - 2)) is None


def test_an_excerpt_is_the_first_40_characters_and_says_so() -> None:
    assert excerpt("ab" * 20) == repr("ab" * 20)
    assert excerpt("ab" * 20 + "c") == repr("ab" * 20) + "..."


@pytest.mark.parametrize(
    "answer",
    [
        "B, there is no clear evidence of a mass.",
        "B) Heart",
        "(B)",
        "B.",
        "Answer: B",
        "The answer is B",
        # opening the answer or a line
        "B)",
        "(b)",
        "b.",
        "b) heart",
        "B: Lung",
        "B - Lung",
        "B – Lung",
        "B; Lung",
        "B.Lung",
        "[B] Lung",
        "B\nLung",
        "Lung\nB",
        "- B",
        "B!",
        "B?",
        # mark-up
        "**B**",
        "**B** Lung",
        "*B*. Lung",
        "`B`",
        "'B'",
        '"B"',
        "<B>",
        "<b>B</b>",
        r"\boxed{B}",
        r"$\boxed{B}$",
        '{"answer": "B"}',
        "## B",
        # announced
        "Option B",
        "option b",
        "Answer B",
        "the answer is b",
        "The correct answer is (B).",
        "The best choice is: B) Lung",
        "Final answer: **B**",
        "Therefore, the answer is option B.",
        # more words that name no other choice
        "B) A mass",
        "(B) A large mass in the lung",
        "B, a mass",
        "B. I think so",
        "B) Hepatitis B",
        "B) CT",
        "B) X-ray",
        "B) I can't say for sure, e.g. it looks C-shaped.",
    ],
)
def test_the_right_letter_with_something_added_scores_half(answer: str) -> None:
    assert accuracy_reward(answered(answer), "B") == 0.5
    assert accuracy_reward(answered(answer), "A") == accuracy_reward(answered(answer), "C") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A",
        "C",
        "A) Bone",
        "AB",
        "BB",
        "B5",
        "U.B.",
        "mass",
        "MRI",
        "Д",
        "В",
        "B\u0336",
        "none of the above",
        # several letters
        "A or B",
        "A, B",
        "A/B",
        "A and B",
        "A & B",
        "A B",
        "A\nB",
        "A: B",
        "A–B",
        "B? C?",
        "B, C",
        "B|C",
        "(A) or (B)",
        "B (or C)",
        "B, or possibly C",
        "B maybe C",
        "B, but it could be C",
        "B. Alternatively, C",
        "either A or B",
        "both B and C",
        "A, B, C, D",
        "It could be A. It could be B.",
        "b, c",
        "A) Heart B) Lung",
        "B) Lung C) Heart",
        "A. Heart B. Lung",
        "B: Lung A: Heart",
        "A) Heart or B) Lung",
        "B) Lung\nC) Heart",
        "A. 7\nB. 6\nC. 5",
        "~~B~~ C",
        "B: no, C",
        "B, C are possible",
        "B, not A",
        # denied
        "not B",
        "It is not B",
        "The answer is not B",
        "B is wrong",
        "(B) is wrong",
        "B is not correct",
        "**B** is not correct",
        "B isn't right",
        "B) isn’t right",
        "I would not choose B",
        "anything but B",
        "neither A nor B",
        # followed by a word, part of a word or of a name
        "B Heart",
        "B-cell lymphoma",
        "B cell lymphoma",
        "B lymphocytes",
        "The diagnosis is B cell lymphoma",
        "B-lines",
        "A-B",
        "hepatitis B",
        "Hepatitis B.",
        "hepatitis A or B",
        "Vitamin B",
        "Influenza B",
        "Group B streptococcus",
        "Type B",
    ],
)
def test_a_wrong_missing_or_ambiguous_letter_scores_nothing(answer: str) -> None:
    assert accuracy_reward(answered(answer), "B") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "a mass",
        "A mass in the left lung",
        "A chest X-ray",
        "A Mass",
        "The answer is a mass",
        "The answer is A mass",
        "It is a mass, with a rim.",
        "Yes, a significant one",
        "a (large) mass",
        "A 3 cm mass",
        "A left-sided mass",
        "A T2-weighted MRI",
        "A B-cell lymphoma",
        "A not uncommon finding",
        "A/P view",
        "A–P view",
        "an A-line",
        "Influenza A",
        "I think it is the heart",
        "I can't say",
        "I'm not sure",
        "e.g. the heart",
        # "ı".upper() is "I", and re.IGNORECASE takes "İ" for one
        "ı",
        "İ",
    ],
)
def test_an_article_a_pronoun_or_a_look_alike_is_not_a_letter(answer: str) -> None:
    assert parse_letter(answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        "A)",
        "A. Mass",
        "a) mass",
        "A: a mass",
        "A, a large mass",
        "A) A mass",
        "Option A",
        "Answer: a",
        "**A** Heart",
        r"\boxed{A}",
    ],
)
def test_an_a_with_punctuation_after_it_is_a_letter(answer: str) -> None:
    assert parse_letter(answer) == "A"


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("B", 0.0),  # without an answer block, no letter counts
        ("<think>B</think>", 0.0),
        ("The answer is B. <think>t</think>", 0.0),
        ("<think>t</think><answer>B", 0.0),  # truncated
        ("</answer>B<answer>", 0.0),
        ("<answer>B</answer>", 1.0),  # the format has its own rule
        ("<Answer>B</ANSWER>", 1.0),
        ("<think>It may be A or C.</think><answer>B</answer>", 1.0),
        ("<answer>B</answer><answer>B</answer>", 0.5),
        ("<answer><answer>B</answer></answer>", 0.5),
        ("<think>t</think><answer></answer><answer>B</answer>", 0.5),
        ("<think>inside <answer>...</answer> tags</think><answer>B</answer>", 0.5),
        ("<answer>B</answer><answer>C</answer>", 0.0),
        ("<answer>C</answer> no, wait <answer>B</answer>", 0.0),
        ("<answer>C <answer>B</answer>", 0.0),
        ("".join(f"<answer>{letter}</answer>" for letter in "ABCD"), 0.0),
    ],
)
def test_only_an_answer_block_counts_and_answering_twice_never_pays(
    completion: str, expected: float
) -> None:
    assert accuracy_reward(completion, "B") == expected


@pytest.mark.parametrize("answer", ["", "AB", "6", "K", "Ｂ", "[B]", "Heart"])
def test_a_ground_truth_that_is_not_a_letter_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="must be one letter, A to J"):
        accuracy_reward(answered("B"), answer)


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("<think>x</think><answer>B</answer>", "B"),
        ("<think>x</think><answer>B) Heart</answer>", "B"),
        ("<think>x</think>B", "B"),
        ("<think>x</think>B</think>", "B"),
        ("<think>x</think>B</think>C", None),
        ("<think>x</think>\n\nThe answer is B.", "B"),
        ("<think>A</think><answer>B", "B"),
        ("B", "B"),
        ("The scan shows a mass, so the answer is B.", "B"),
        ("Heart (B)", None),
        ("<think>The answer is B", None),
        ("\n<think>The answer is B", None),
        ("<think>The answer is B</think>", None),
        ("<think>x</think><answer>A or B</answer>", None),
        ("<answer>B</answer><answer>C</answer>", None),
        ("A mass is seen.", None),
        ("", None),
    ],
)
def test_a_lenient_reader_finds_the_letter_without_tags_but_never_inside_the_reasoning(
    completion, letter
) -> None:
    assert read_letter(completion) == letter


def test_score_applies_every_rule_in_the_order_of_the_table() -> None:
    assert list(RULES) == ["format", "accuracy"]
    assert score("<think>It is the heart.</think><answer>B) Heart</answer>", "b") == (
        Verdict("format", 1.0, "one think block, then one answer block, and nothing else"),
        Verdict("accuracy", 0.5, "the answer chooses B with something added: 'B) Heart'"),
    )


def test_a_new_reward_is_a_new_entry_of_the_table(monkeypatch) -> None:
    def judge_brevity(completion: str, answer: str) -> tuple[float, str]:
        return 1.0 / len(completion), "shorter is better"

    monkeypatch.setitem(RULES, "brevity", judge_brevity)
    assert score("four", "B")[2] == Verdict("brevity", 0.25, "shorter is better")


@pytest.mark.parametrize(
    ("completion", "rule", "why"),
    [
        ("B", 0, "the tags are '', not <think> </think> <answer> </answer>"),
        ("Well: <think>t</think><answer>B</answer>", 0, "text outside the blocks: 'Well:'"),
        ("<think> </think><answer>B</answer>", 0, "the think block is empty"),
        ("<think>t</think><answer> </answer>", 0, "the answer block is empty"),
        ("B", 1, "no <answer>...</answer> block"),
        ("<answer>A or B</answer>", 1, "the answer 'A or B' chooses no single option letter"),
        ("<answer>A) Lung</answer>", 1, "the answer chooses A; B is right"),
        ("<answer>b</answer>", 1, "the answer is exactly B"),
    ],
)
def test_each_verdict_has_its_own_reason(completion: str, rule: int, why: str) -> None:
    assert score(completion, "B")[rule].why == why


# Hostile completions


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>" * 125_000,
        "<answer>" + "</answer>" * 111_000,
        "<answer>B</answer>" * 55_000,
        "<think>" * 140_000,
        "<answer>" + "<" * 1_000_000 + "</answer>",
        "<think>" + "\u200b" * 1_000_000 + "</think><answer>B</answer>",
        "<think>t</think>" + " " * 1_000_000 + "<answer>B</answer>",
        "<answer>" + "A " * 500_000 + "</answer>",
        "<answer>" + "B" + " " * 1_000_000 + "x</answer>",
        "<answer>" + "\ufdfa" * 300_000 + "</answer>",
        "<think>" + "x" * 1_000_000,
        "<answer>" + " " * 1_000_000 + "B</answer>",
    ],
    ids=lambda completion: ascii(completion[:12]),
)
def test_a_megabyte_of_anything_is_scored_at_once(completion: str) -> None:
    started = time.process_time()
    score(completion, "B")
    assert (
        time.process_time() - started < 0.5
    )  # about 10 ms when idle; a quadratic pattern takes minutes


@pytest.mark.parametrize(
    "unit",
    [
        "A ",
        "B:",
        "a,",
        "not ",
        "B or ",
        "(",
        ", (",
        " .",
        "**B** ",
        "option B ",
        "is B not ",
        "B, and C ",
        "answer: ",
    ],
)
def test_no_pattern_backtracks_on_the_longest_answer_that_is_read(unit: str) -> None:
    text = (unit * 1000)[:1000]
    started = time.process_time()
    parse_letter(text)
    assert time.process_time() - started < 0.5


def test_an_answer_of_more_than_a_thousand_characters_chooses_nothing() -> None:
    assert accuracy_reward(answered("B, because " + "x" * 900), "B") == 0.5
    assert accuracy_reward(answered("B, because " + "x" * 1000), "B") == 0.0


def test_the_reasons_are_printable_for_any_completion() -> None:
    for completion in [
        "\x1b[2J",
        "<think>\x1b]0;x\x07</think>\x9b1m<answer>\u202eB\x1b[31m</answer>",
        "\ud800",
        answered("\x1b[31mB or C\r\n"),
        answered("B\x08\x08 \u2028"),
        answered("x" * 500),
    ]:
        assert all(
            verdict.why.isprintable() and len(verdict.why) < 160
            for verdict in score(completion, "B")
        )


# The command


def test_the_command_prints_each_rule_and_why() -> None:
    run = command("--answer", "B", answered("B) Heart"))
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "format    1.0  one think block, then one answer block, and nothing else",
        "accuracy  0.5  the answer chooses B with something added: 'B) Heart'",
    ]


def test_the_command_reads_standard_input_and_prints_no_escape_sequence() -> None:
    run = command("--answer", "B", "-", stdin=answered("\x1b[31m心脏"), encoding="ascii")
    assert run.returncode == 0 and "\x1b" not in run.stdout and run.stdout.isascii()
    lines = run.stdout.splitlines()
    assert lines[0].startswith("format    1.0  ") and lines[1].startswith("accuracy  0.0  ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--answer", "Heart", "x"],
        ["--answer", "\x1b[2J", "x"],
        ["x"],
        ["--answer", "B"],
        ["--answer", "B", "x", "\x1b[2J"],
    ],
)
def test_bad_arguments_are_one_printable_line_and_exit_code_2(arguments: list[str]) -> None:
    run = command(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1 and run.stderr.rstrip("\n").isprintable()


# Real completions: MedVLM-R1 and other Qwen2-VL models


@pytest.mark.parametrize(
    "completion, answer, expected",
    [
        (
            "<think>\nThe heart and lungs appear normal, and there are no signs of fluid "
            "accumulation.\n</think>\n\n<answer>R</answer>",
            "D",
            (1.0, 0.0),
        ),  # a letter without an option
        (
            "<think>\nThe mass is also not in the pancreas, as it is not a typical location",
            "B",
            (0.0, 0.0),
        ),  # truncated
        ("<think>\nA. 10\nB. 9\nC. 8\nD. 7\n</think>\n<answer>\nC. 8\n</answer>", "C", (1.0, 0.5)),
        ("<think>\nA. 7\nB. 6\nC. 5\nD. 4\nE. 3\n", "A", (0.0, 0.0)),  # options recited, no answer
        (
            "<think>根据题意，我们可以知道，船从A点出发，向东航行，到达B点",
            "B",
            (0.0, 0.0),
        ),  # truncated in Chinese
        ("Therefore, angle BAD = 90° - 42° = 48°. <answer>48</answer>", "B", (0.0, 0.0)),
        (
            "Connect BD, then angle D = 35.0.\n<think>Connect BD.</think>\n<answer>35.0</answer>",
            "D",
            (0.0, 0.0),
        ),
        ("Also, angle BAC = 20°. Therefore, the answer is 40.", "B", (0.0, 0.0)),
        (
            "<think> The total green area is pi. </think> <answer> pi </answer>",
            "I",
            (1.0, 0.0),
        ),  # published code: 0.5
        ("<answer>3</answer>", "C", (0.0, 0.0)),
    ],
)
def test_instructive_real_completions_score_as_a_reader_would(
    completion: str, answer: str, expected: tuple[float, float]
) -> None:
    assert (format_reward(completion), accuracy_reward(completion, answer)) == expected


def test_the_800_real_completions_keep_their_reviewed_scores() -> None:
    rows = [json.loads(line) for line in shared("completions.jsonl").splitlines()]
    lettered, other = Counter(), Counter()
    for row in rows:
        if row["ground_truth"] in ("A", "B", "C", "D"):
            lettered[
                format_reward(row["completion"]),
                accuracy_reward(row["completion"], row["ground_truth"]),
            ] += 1
            continue
        best = max(LETTERS, key=lambda letter: accuracy_reward(row["completion"], letter))
        other[format_reward(row["completion"]), accuracy_reward(row["completion"], best)] += 1
    assert lettered == {(1.0, 1.0): 534, (1.0, 0.0): 62, (0.0, 0.0): 2}
    assert other == {(1.0, 0.0): 166, (0.0, 0.0): 33, (1.0, 0.5): 1, (1.0, 1.0): 2}


LAYOUTS = [
    "{}) {}",
    "{}. {}",
    "({}) {}",
    "{}: {}",
    "{}, {}",
    "**{}** {}",
    "{}\n{}",
    "The answer is {}) {}",
]


def test_real_options_score_half_after_their_letter_and_nothing_alone() -> None:
    questions = json.loads(shared("medvlm_r1_test_questions.json"))
    assert len(questions) == 900
    for question in questions:
        right = question["solution"]
        for layout in LAYOUTS:
            assert parse_letter(layout.format(right, question["answer"])) == right
        for letter, option in zip("ABCD", question["options"], strict=False):
            assert parse_letter(option) is None, option
            assert accuracy_reward(answered(letter), right) == (letter == right), question
            assert accuracy_reward(answered(f"{letter}) {option}"), right) == 0.5 * (
                letter == right
            ), question


def test_the_answer_runs_from_the_first_to_the_last_tag() -> None:
    assert answer_text("x<answer> B\n</answer>y") == " B\n"
    assert answer_text("<answer>A</answer>,<answer>B</answer>") == "A</answer>,<answer>B"
    assert answer_text("B") is answer_text("<answer>B") is answer_text("</answer><answer>") is None
