"""The report: its content, its safety against hostile text, and its use in a browser."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluation.report.curves import STYLE, curve_panels
from evaluation.report.page import displayable, verdict, write_report
from evaluation.statistics import wilson

MODELS = ("base", "sft", "grpo")
HOSTILE = (
    "<script>window.hacked=1</script></script><!--<img src=x onerror=window.hacked=1>"
    "{{ 7919*7919 }} \u2028 & \"'"
)
STEERING = "\u202eabc\u202c \x00 \x1b[31m \ud800"


def picture(folder, number, side=84):
    """A disc on black, with a size and place of its own."""
    y, x = np.mgrid[:side, :side]
    disc = (x - 20 - number % 40) ** 2 + (y - 20 - number // 40) ** 2 < (8 + number % 9) ** 2
    file = folder / f"scan{number}.png"
    Image.fromarray((disc * 200 + y % 50).astype(np.uint8)).save(file)
    return str(file)


def answer(model, letter, truth, thought="I see a disc.", flags=(), **fields):
    accuracy = {"score": float(letter == truth), "why": f"the answer is exactly {letter}"}
    return {
        "model": model,
        "letter": letter,
        "tokens": 12,
        "ended": True,
        "flags": list(flags),
        "completion": f"<think>{thought}</think><answer>{letter}</answer>",
        "rewards": {"accuracy": accuracy},
        "probes": {"blank image": "A", "permuted options": letter},
    } | fields


def case(folder, number, models=MODELS, **fields):
    """A question; base is right on every second one, grpo always, sft never."""
    truth = "AB"[number % 3 % 2]
    letters = {"base": truth if number % 2 else "C", "sft": None, "grpo": truth}
    flags = {
        "base": ["names no option"] if number % 5 == 0 else [],
        "sft": ["no reasoning"],
        "grpo": [],
    }
    return {
        "id": f"test.json row {number + 1}",
        "modality": ("MRI", "CT", "X-ray")[number % 3],
        "question_type": ("Diagnosis", "Anatomy")[number % 2],
        "question": f"What is seen in scan {number}?",
        "options": ["disc", "ring", f"shape {number}"],
        "ground_truth": truth,
        "images": [picture(folder, number)],
        "answers": [answer(model, letters[model], truth, flags=flags[model]) for model in models],
    } | fields


def accuracy(model, modality, right, n, kind=None, blind=0.5):
    low, high = wilson(right, n)
    return {
        "model": model,
        "modality": modality,
        "question_type": kind,
        "n": n,
        "right": right,
        "rate": right / n,
        "low": low,
        "high": high,
        "strict": right / n,
        "format": 1.0,
        "tokens": 12.5,
        "cut_off": 0.01,
        "chance": 0.375,
        "best_blind": "text_prior",
        "best_blind_rate": blind,
        "sees": low > blind,
    }


EMPTY = {
    "contract": {},
    "files": [],
    "train_questions": None,
    "train_modality": None,
    "pairs": [],
    "blind": {},
    "ablated": {},
    "faithfulness": [],
    "early_answering": {},
    "leakage": None,
    "samples": None,
}


def results(models=MODELS, **parts):
    """The accuracy of each model, and `parts`."""
    right = {"base": 40, "sft": 55, "grpo": 90}
    rows = [
        accuracy(model, modality, right[model], 100)
        for model in models
        for modality in ("MRI", "CT")
    ]
    named = [{"name": model, "folder": f"runs/{model}", "digest": "beef"} for model in models]
    return EMPTY | {"name": "tiny", "models": named, "accuracy": rows} | parts


def full_results():
    check = {
        "check": "names an option",
        "count": 9,
        "of": 10,
        "rate": 0.9,
        "low": 0.6,
        "high": 0.98,
        "meaning": "It names one.",
    }
    rates = {"MRI": 0.375, "CT": 0.5}
    kinds = [accuracy(model, "MRI", 9, 10, "Diagnosis") for model in MODELS]
    kinds += [accuracy(model, "CT", 9, 10, "Anatomy") for model in MODELS]
    early = [{"kept": kept / 4, "changed": 0.5 - kept / 8, "right": 0.4} for kept in range(5)]
    against = {"first": "grpo", "second": "base"}
    pair = {
        "kind": "near_duplicate",
        "train": "train.json row 1",
        "test": "test.json row 2",
        "distance": 0.01,
    }
    sampled = {"mean": 0.5, "pass_at_k": 0.875, "majority": 0.625}
    return results(
        contract={"prompt": "aa11", "max_new_tokens": 40, "hash": "f00d"},
        train_modality="MRI",
        files=["test.json"],
        train_questions="train.json",
        accuracy=results()["accuracy"] + kinds,
        pairs=[
            against | {"modality": "MRI", "only_first": 55, "only_second": 5, "p": 1e-11},
            against | {"modality": "CT", "only_first": 9, "only_second": 7, "p": 0.8},
        ],
        blind={"chance": rates, "text_prior": {"MRI": 0.53}},
        ablated={"grpo": {"blank image": {"MRI": 0.41, "CT": 0.39}}},
        faithfulness=[check | {"model": model} for model in MODELS],
        early_answering={"grpo": early, "sft": []},
        leakage={
            "train": 6,
            "test": 9,
            "same_path": 0,
            "same_bytes": None,
            "near_duplicates": None,
            "same_question": 3,
            "missing_images": 4,
            "answers_seen": {"MRI": 0.3675},
            "pairs": [pair],
            "pairs_total": 70,
        },
        samples={
            "k": 8,
            "temperature": 0.9,
            "table": [sampled | {"model": "grpo", "modality": "MRI"}],
        },
    )


RUNS = {
    "sft": [{"step": step, "loss": 1 / (step + 1), "probability": 0.5} for step in range(4)],
    "grpo": [
        {"step": step, "reward": 1.0, "kl": 0.1 * step, "completions/mean_length": 12.0}
        for step in range(4)
    ],
}


class Page(HTMLParser):
    """A page's elements, the content of its scripts, and its visible text."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.scripts, self.shown_text, self.inside = [], {}, [], None
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.shown_text))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", tag) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data
        else:
            self.shown_text.append(data)

    def json(self, name):
        return json.loads(self.scripts[f"{name}-data"])

    def ids(self):
        return {attributes.get("id") for _, attributes in self.elements}


@pytest.fixture
def report(tmp_path):
    def _report(results, cases=(), runs=None):
        write_report(tmp_path / "report.html", results, cases, runs or {})
        return Page(tmp_path / "report.html")

    return _report


def test_the_page_loads_nothing_and_allows_only_its_own_script(tmp_path, report):
    page = report(full_results(), [case(tmp_path, 0)], RUNS)
    for tag, attributes in page.elements:
        for name in (
            "src",
            "href",
            "srcset",
            "action",
            "poster",
            "data",
            "xlink:href",
            "background",
            "formaction",
        ):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|image-set", page.scripts["style"])
    assert (
        "innerHTML" not in page.scripts["script"]
        and "insertAdjacentHTML" not in page.scripts["script"]
    )
    (policy,) = [
        a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256(page.scripts["script"].encode()).digest()).decode()
    assert (
        policy.startswith("default-src 'none'; img-src data:;")
        and f"script-src 'sha256-{digest}';" in policy
    )


def test_hostile_text_from_any_source_is_neither_markup_nor_script(tmp_path, report):
    tame = report(full_results() | {"name": "x"}, [case(tmp_path, 0)], RUNS)
    text = HOSTILE + STEERING
    evil = json.dumps(full_results())
    for tame_text in ("grpo", "Anatomy", "It names one.", "test.json row 2", "f00d"):
        evil = evil.replace(f'"{tame_text}"', json.dumps(text))  # values and keys
    evil = json.loads(evil)
    one = case(
        tmp_path, 0, id=text, modality=text, question_type=text, question=text, options=[text, "b"]
    )
    one["answers"][2] |= {
        "model": text,
        "completion": text,
        "flags": [text],
        "probes": {text: text},
    }
    page = report(evil | {"name": text}, [one], {text: RUNS["grpo"]})
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in tame.elements}
    assert page.source.count("<script") == page.source.count("</script>") == 4
    assert not any(steering in page.source for steering in ("\u202e", "\x00", "\x1b", "\u2028"))
    (found,) = page.json("cases")
    assert found["question"] == displayable(text) == found["answers"][2]["completion"]
    assert "{{ 7919*7919 }}" in found["id"] and str(7919 * 7919) not in page.source


def test_characters_that_affect_the_display_become_code_points_and_others_stay():
    assert displayable({"a\u202e": ["\x00\ud800", 1, None]}) == {
        "a⟨U+202E⟩": ["⟨U+0000⟩⟨U+D800⟩", 1, None]
    }
    assert displayable("עברית\t日本語\n👩\u200d⚕️ é\r\n") == "עברית\t日本語\n👩\u200d⚕️ é\n"
    assert displayable([math.nan, math.inf, 0.5]) == [None, None, 0.5]


def test_a_missing_image_is_a_box_and_each_image_is_stored_once_and_small(tmp_path, report):
    wide = picture(tmp_path, 500, side=600)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    shown = ([wide], [str(tmp_path / "gone.png"), wide], [str(broken)], [])
    cases = [case(tmp_path, number, images=images) for number, images in enumerate(shown)]
    page = report(results(), cases)
    images = page.json("images")
    assert [one["images"] for one in page.json("cases")] == [[0], [1, 0], [2], []]
    assert images[0]["width"] == 600
    assert images[1]["why"] == "no such image file" and "not a readable" in images[2]["why"]
    # Pages are shared, and should not reveal their author's folders.
    assert str(tmp_path) not in json.dumps(images)
    drawn = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2])))
    assert max(drawn.size) == 160


def test_empty_results_have_no_section(report):
    page = report(results())
    sections = {"blind", "reasoning", "leakage", "training"}
    assert not sections & page.ids() and "accuracy" in page.ids()
    assert "in domain" not in page.text and "Pairwise comparison" not in page.text
    whole = report(full_results(), [], RUNS)
    assert sections <= whole.ids()
    for part, empty in EMPTY.items():
        report(full_results() | {part: empty})


FACTS = (
    "90.0 %",
    "82.6 – 94.5",
    "MRI in domain",
    "CT out of domain",
    "55 : 5 p < 0.001",
    "9 : 7 p = 0.80",
    "53.0 % best",
    "9 of 10",
    "It names one.",
    "not compared",
    "4 image files are missing",
    "36.8 % of MRI questions",  # 0.3675, a half that is rounded up everywhere
    "1 of 70",
    "87.5 % any right",
    "62.5 % majority right",
    "f00d",
    "runs/grpo, digest beef",
    "best blind 50.0 %, text prior",
)


def test_the_numbers_are_in_the_page(report):
    text = report(full_results(), [], RUNS).text.replace("\xa0", " ")
    for fact in FACTS:
        assert fact in text, fact


def test_a_meaning_that_differs_between_models_is_shown_for_each(report):
    rows = full_results()["faithfulness"]
    page = report(
        full_results() | {"faithfulness": [rows[0], rows[1] | {"meaning": "Quite another."}]}
    )
    assert page.text.count("It names one.") == 1 and page.text.count("Quite another.") == 1
    assert report(full_results()).text.count("It names one.") == 1


def test_a_modality_without_questions_of_a_type_has_a_dash(report):
    page = report(full_results())
    types = page.text.partition("By question type")[2].partition("8 sampled answers")[0]
    assert types.count("–") == 6 and types.count("9 of 10") == 6


def test_verdict_says_where_each_model_sees_and_which_is_better():
    whole = full_results()["accuracy"][:6]
    whole[1]["sees"] = True
    sentences = [text.replace("\xa0", " ") for text in verdict(full_results(), whole)]
    assert sentences == [
        "base is above the best guess without the image on CT (40.0 % vs. 50.0 %); "
        "on MRI (40.0 % vs. 50.0 %) there is no evidence of seeing.",
        "sft shows no evidence of seeing on MRI (55.0 % vs. 50.0 %) or CT (55.0 % vs. 50.0 %).",
        "grpo is above the best guess without the image on MRI (90.0 % vs. 50.0 %) and CT "
        "(90.0 % vs. 50.0 %).",
        "Compared with base, grpo is better on MRI and not significantly different on CT.",
    ]


def test_a_single_model_is_compared_with_no_other(tmp_path, report):
    page = report(
        results(models=("grpo",)), [case(tmp_path, 1, models=("grpo",))], {"grpo": RUNS["grpo"]}
    )
    assert "1 model ·" in page.text and "Compared with" not in page.text
    assert page.json("colours") == [["grpo", "m0"]]


def test_a_rate_that_was_not_measured_is_a_dash(report):
    text = report(full_results()).text.replace("\xa0", " ")
    assert "the option text most often right in training 53.0 % best –" in text


def test_curves_of_a_run_without_rewards_show_its_loss_and_skip_values_that_are_not_finite():
    loss, probability = curve_panels(
        RUNS["sft"] + [{"step": 4, "loss": math.nan, "probability": 0.6}]
    )
    assert "Loss" in loss and "Probability" in probability and "nan" not in loss
    points = [len(re.search('points="([^"]*)"', panel)[1].split()) for panel in (loss, probability)]
    assert points == [4, 5] and len(curve_panels(RUNS["grpo"])) == 4


def test_the_style_of_the_curves_applies_to_nothing_else_in_a_page():
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@media[^{]*\{", "", STYLE))
    assert rules and all(selector.strip().startswith(".curves ") for selector in rules)


# --- in a browser ---


@pytest.fixture(scope="module")
def chromium():
    """A browser for all tests of this file."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install '.[test]'"
    )
    executable = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if executable is None:
        pytest.skip("needs Chromium: install chromium, chromium-browser or google-chrome")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The URL of a report with twelve cases, the last ones hostile or unusual, and its cases."""
    folder = tmp_path_factory.mktemp("small")
    cases = [case(folder, number) for number in range(12)]
    cases[9] |= {
        "id": "a&b=c#d %20 é",
        "question": HOSTILE + STEERING,
        "options": [HOSTILE, "x" * 3000],
    }
    cases[9]["answers"][0] |= {"completion": HOSTILE + "<think>" + "w" * 20_000, "ended": False}
    cases[9]["answers"][1] |= {"completion": "", "rewards": {}, "flags": [], "probes": {}}
    cases[10] |= {"images": [str(folder / "gone.png")]}
    cases[11] |= {"images": [], "question_type": ""}
    write_report(folder / "report.html", full_results(), cases, RUNS)
    return (folder / "report.html").as_uri(), cases


@pytest.fixture
def visit(chromium):
    """visit(url) -> an open page. At the end, no errors and no requests other than for the page may
    have occurred.
    """
    contexts, errors, requests = [], [], []

    def _visit(url, width=1280, height=900, **options):
        size = {"width": width, "height": height}
        contexts.append(chromium.new_context(viewport=size, reduced_motion="reduce", **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type != "log" else None,
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        return page

    yield _visit
    for context in contexts:
        context.close()
    assert errors == []
    loaded = [url.partition("#")[0] for url in requests if not url.startswith("data:")]
    assert loaded and all(
        url.startswith("file:") and url.endswith("/report.html") for url in loaded
    )


def count(page):
    return page.locator("#count b").inner_text()


def chosen(page):
    """The id of the open case, once the page has handled all events: a click on a link raises a
    separate one.
    """
    page.evaluate("() => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 50))")
    return page.locator("#case .id").inner_text()


def right(one, model):
    return any(a["model"] == model and a["letter"] == one["ground_truth"] for a in one["answers"])


def test_filters_select_their_cases_and_the_counts_are_right(visit, small):
    url, cases = small
    page = visit(url)
    assert count(page) == "12 of 12" and page.locator("#list li").count() == 12
    filters = {
        "modality": ("MRI", lambda one: one["modality"] == "MRI"),
        "type": ("Diagnosis", lambda one: one["question_type"] == "Diagnosis"),
        "is.base": ("wrong", lambda one: not right(one, "base")),
        "is.grpo": ("right", lambda one: right(one, "grpo")),
        "flag": (
            "base: names no option",
            lambda one: "names no option" in one["answers"][0]["flags"],
        ),
    }
    for name, (value, passes) in filters.items():
        page.locator(f'[name="{name}"]').select_option(value)
        expected = [one["id"] for one in cases if passes(one)]
        assert len(expected) > 0 and count(page) == f"{len(expected)} of 12", name
        assert page.locator("#list li").count() == len(expected) and chosen(page) == expected[0]
        page.get_by_role("button", name="Clear").click()
        page.locator("#count b", has_text="12 of 12").wait_for()
    page.locator('[name="is.base"]').select_option("wrong")
    page.locator('[name="modality"]').select_option("CT")
    both = [one for one in cases if one["modality"] == "CT" and not right(one, "base")]
    assert count(page) == f"{len(both)} of 12"
    counts = f"{len(both)} of 12 shown base 0 right sft 0 right grpo {len(both)} right"
    assert " ".join(page.locator("#count").inner_text().split()) == counts
    page.reload()
    assert count(page) == f"{len(both)} of 12"  # the address contains the filters


def test_search_finds_text_of_questions_and_answers_and_says_if_nothing_matches(visit, small):
    page = visit(small[0])
    for text, expected in (
        ("scan 7", 1),
        ("SHAPE 3", 1),
        ("i see a disc", 12),
        ("nothing like it", 0),
    ):
        page.locator('[name="q"]').fill(text)
        assert count(page) == f"{expected} of 12"
    assert page.locator("#case").inner_text() == "No question matches these filters."


def test_keys_step_through_the_cases(visit, small):
    page = visit(small[0])
    for key, row in (
        ("j", 2),
        ("ArrowRight", 3),
        ("j", 4),
        ("k", 3),
        ("ArrowLeft", 2),
        ("k", 1),
        ("k", 1),
    ):
        page.keyboard.press(key)
        assert chosen(page) == f"test.json row {row}", key
    assert page.locator("#list [aria-current]").count() == 1
    page.keyboard.press("/")
    page.keyboard.type("jk 7")  # in the search these are letters
    assert page.locator('[name="q"]').input_value() == "jk 7"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement === document.body")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.get_by_role("button", name="Clear").click()
    page.locator("#list a").first.focus()
    page.keyboard.press("ArrowDown")
    assert chosen(page) == "test.json row 2"
    assert page.evaluate("document.activeElement.matches('[aria-current]')")


def test_a_case_with_any_id_can_be_linked(visit, small):
    page = visit(small[0])
    page.locator("#list a").nth(9).click()
    assert chosen(page) == "a&b=c#d %20 é"
    again = visit(page.url)
    assert chosen(again) == "a&b=c#d %20 é" and again.locator("#case").is_visible()
    lost = visit(small[0] + "#case=gone")
    assert "There is no question “gone”" in lost.locator("#case").inner_text()


def test_links_of_leaking_pairs_lead_to_their_cases(visit, small):
    page = visit(small[0])
    page.locator("#leakage summary").click()
    page.locator("#leakage a").click()
    assert chosen(page) == "test.json row 2"


def test_hostile_text_stays_text(visit, small):
    page = visit(small[0] + "#case=a%26b%3Dc%23d+%2520+%C3%A9")
    assert (
        page.locator("#case h3")
        .inner_text()
        .startswith("<script>window.hacked=1</script></script><!--<img src=x")
    )
    assert page.locator("#case h3").inner_text().count("⟨U+") >= 4
    assert "</script><!--<img" in page.locator("#case .card").first.inner_text()
    assert "Reasoning (no closing tag)" in page.locator("#case .card").first.inner_text()
    assert "The completion is empty." in page.locator("#case .card").nth(1).inner_text()
    assert page.locator("#case script, #case img:not([src^='data:'])").count() == 0
    assert page.evaluate("typeof window.hacked") == "undefined"


def test_the_policy_stops_an_injected_script(chromium, small):
    page = chromium.new_page()
    page.goto(small[0])
    script = "Object.assign(document.createElement('script'), {textContent: 'window.hacked=1'})"
    page.evaluate(f"document.body.append({script})")
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=window.hacked=1>')"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("typeof window.hacked") == "undefined"
    page.close()


def test_a_case_shows_reasoning_answer_rules_and_probes_and_enlarges_its_image(visit, small):
    page = visit(small[0] + "#case=test.json+row+2")
    card = page.locator("#case .card").last
    assert card.locator(".think .content").inner_text() == "I see a disc."
    assert card.locator(".answer .content").inner_text() == "B"
    assert "the answer is exactly B" in card.locator(".rules").inner_text()
    card.locator("summary").click()
    assert card.locator(".probes").inner_text().split() == [
        "blank",
        "image",
        "A",
        "permuted",
        "options",
        "B",
    ]
    assert page.locator("#case .options .right").inner_text().split() == [
        "B",
        "ring",
        "✓",
        "right",
        "base",
        "grpo",
    ]
    page.locator("#case .enlarge").click()
    assert "84 × 84 pixels" in page.locator("#large").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()
    page.goto(small[0] + "#case=test.json+row+11")
    assert "gone.png: no such image file" in page.locator("#case .gone").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(visit, small, scheme):
    page = visit(small[0], color_scheme=scheme)
    style = "getComputedStyle(document.querySelector"
    colours = page.evaluate(
        f"[{style}('body')).color, {style}('body')).backgroundColor, {style}('.note')).color, "
        f"{style}('.curves text')).fill]"
    )
    ink, paper, note, curve = (luminance(colour) for colour in colours)
    assert (paper > 0.9) == (scheme == "light")
    for text in (ink, note, curve):
        assert (max(text, paper) + 0.05) / (min(text, paper) + 0.05) >= 4.5  # WCAG 2 AA


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_nothing_is_wider_than_a_phone(visit, small):
    page = visit(small[0] + "#case=a%26b%3Dc%23d+%2520+%C3%A9", width=390, height=844)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert (
        page.evaluate("document.querySelector('#accuracy .scroll').scrollWidth") > 390
    )  # it scrolls by itself
    page = visit(small[0], width=390, height=844)
    assert page.locator("#box").evaluate("(box) => box.scrollTop") == 0
    page.locator("#list a").nth(3).click()
    assert chosen(page) == "test.json row 4" and page.locator("#case .id").is_visible()
    assert 0 <= page.locator("#case").bounding_box()["y"] < 400  # scrolled into view


def test_nine_hundred_cases_with_images_open_within_three_seconds(visit, tmp_path):
    cases = [case(tmp_path, number) for number in range(900)]
    write_report(tmp_path / "report.html", full_results(), cases, RUNS)
    started = time.process_time()
    page = visit((tmp_path / "report.html").as_uri())
    page.locator("#case .id").wait_for()
    assert time.process_time() - started < 3
    assert count(page) == "900 of 900"
    assert page.locator("#list li").count() < 200  # the others follow on scrolling
    page.locator("#box").evaluate("(box) => box.scrollTo(0, box.scrollHeight)")
    page.locator("#list li").nth(100).wait_for()
    page.evaluate("location.hash = 'case=test.json+row+900'")
    page.locator("#case .id", has_text="test.json row 900").wait_for()
    assert page.locator("#list li").count() == 900
