"""Multiple choice: whole items, shown offline, first choices kept, progress drawn."""

import json
import shutil
from datetime import UTC, datetime, timedelta

import matplotlib.pyplot as plt
import pytest
import yaml

from course import ROOT
from course.notebooks import read
from course.practice import bank, choices, pictures
from course.practice.choices import Multiple, Option
from course.practice.journal import Journal, Review
from course.units import CourseError, units

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ITEMS = [
    Multiple(
        "lora-alpha",
        "Is 1 < 2 & 2 > 1?",
        (Option("Yes.", "It is <so>.", True), Option("No.", "It is not."), Option("At times.", "Always.")),
        "02",
        2,
    ),
    Multiple("lora-merge", "And what of α/r?", (Option("A scale.", "Right.", True), Option("A rank.", "That is r.")), "02", 3),
]


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def items():
    return choices.load()


# what is asked


def test_there_are_enough_in_every_unit(items):
    assert len(items) >= 30
    having = {item.unit for item in items}
    assert having == {unit.number for unit in units() if unit.interview.exists() and int(unit.number) <= 12 and unit.number != "11"}


def test_every_option_has_its_reason_and_one_is_right(items):
    for item in items:
        assert [option.right for option in item.options] == [True] + [False] * (len(item.options) - 1)
        assert 3 <= len(item.options) <= 5, item.id
        for option in item.options:
            assert option.say and option.why and option.why != option.say
            assert not any(mark in option.say + option.why + item.ask for mark in ("$", "`", "**", "{", "}"))


def test_the_right_option_is_not_known_by_its_length(items):
    longest = [len(item.options[0].say) > max(len(option.say) for option in item.options[1:]) for item in items]
    assert sum(longest) / len(longest) < 0.45


def test_every_item_asks_about_a_question_of_its_units_bank():
    files = {entry["id"]: source for source, entry in bank.written()}
    for path in choices.FOLDER.glob("*.yaml"):
        assert {files[name] for name in yaml.safe_load(path.read_text())} == {path.name}


@pytest.mark.parametrize(
    "entry, words",
    [
        ("ask: Why?\n  right: {say: a, why: b}\n  claims: {}", "must have ask, right, wrong and claims"),
        ("ask: Why?\n  right: {say: a, why: b}\n  wrong: [{say: 64, why: c}]\n  claims: {}", "put quotes around 64"),
        ("ask: Why?\n  right: {say: a, why: b}\n  wrong: [{say: '{n}', why: c}]\n  claims: {}", "uses n without a claim"),
        ("ask: Why?\n  right: {say: a, why: b}\n  wrong: [{say: a, why: c}]\n  claims: {}", "two options that read alike"),
        ("ask: Why?\n  right: {say: a, why: b}\n  wrong: [{say: d, why: c}]\n  claims: {n: 'svd:break_even_rank(64)'}", "never states n"),
    ],
)
def test_an_item_that_is_not_whole_is_named(tmp_path, entry, words):
    (tmp_path / "02_lora.yaml").write_text(f"lora-alpha:\n  {entry}\n")
    with pytest.raises(ValueError, match=f"02_lora.yaml: 'lora-alpha'.*{words}"):
        choices.load(folder=tmp_path)


def test_what_the_bank_does_not_know_is_named(tmp_path):
    (tmp_path / "02_lora.yaml").write_text("nobody-asked:\n  ask: Why?\n")
    with pytest.raises(ValueError, match="the bank has no question 'nobody-asked'"):
        choices.load(folder=tmp_path)


def test_unit_and_difficulty_choose(items):
    assert {item.unit for item in choices.load("lora")} == {"02"}
    some = choices.load(("01", "04"), "2-3")
    assert {item.unit for item in some} == {"01", "04"} and {item.difficulty for item in some} <= {2, 3}
    with pytest.raises(CourseError, match="there is no multiple choice for unit 01, difficulty 5"):
        choices.load("01", "5")
    with pytest.raises(CourseError, match="there is no unit 'nothing'"):
        choices.load("nothing")


# how it is shown


def test_texts_are_no_markup():
    first, _ = choices.as_jupyterquiz(ITEMS)
    assert first["question"] == "Is 1 &lt; 2 &amp; 2 &gt; 1?" and first["answers"][0]["feedback"] == "It is &lt;so&gt;."
    assert [answer["correct"] for answer in first["answers"]] == [True, False, False]


def test_nothing_is_fetched():
    _, page, script = choices._rendered(ITEMS)
    for text in (page, script):
        assert "https://" not in text and "src =" not in text.replace("script.src", "src")
    assert "typeof MathJax" not in script


def test_in_a_browser_the_first_choice_counts_and_every_reason_is_shown(tmp_path):
    """jupyterquiz's own script, and what it tells the kernel through the field beside it."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium here")
    box, page, script = choices._rendered(ITEMS)
    html = f'<!doctype html><meta charset="utf-8">{page}<div class="choices-{box}"><input></div><script>{script}</script>'
    (tmp_path / "quiz.html").write_text(html, encoding="utf-8")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab, asked, errors = opened.new_page(), [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto((tmp_path / "quiz.html").as_uri())
        tab.wait_for_selector("text=Is 1 < 2 & 2 > 1?")
        for say, why in (("No.", "It is not."), ("Yes.", "It is <so>."), ("A scale.", "Right.")):
            tab.get_by_text(say, exact=True).click()
            tab.wait_for_selector(f"text={why}")
        kept = json.loads(tab.locator(f".choices-{box} input").input_value())
        opened.close()
    assert kept == {"0": False, "1": True} and errors == [] and len(asked) == 1


def test_first_choices_are_kept_once(data):
    keep = choices._Kept(ITEMS, Journal(data))
    keep('{"0": false}')
    keep('{"0": false, "1": true}')
    assert [(review.question, review.rating, review.by) for review in Journal(data).reviews()] == [
        ("lora-alpha", 1, "choice"),
        ("lora-merge", 3, "choice"),
    ]


def test_questions_to_answer_aloud_are_folded(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(thing.data))
    choices.aloud("lora-why-b-zero")
    assert shown[0].startswith("**Why does B start at zero") and shown[0].count("<details>") == 4
    with pytest.raises(CourseError, match="the bank has no question 'none'"):
        choices.aloud("none")


# progress


def test_progress_counts_held_seen_and_chosen(data):
    journal = Journal(data)
    for name, rating, by, days in (
        ("lora-alpha", 4, "quiz", 60),
        ("lora-alpha", 4, "quiz", 30),
        ("lora-merge", 2, "interview", 3),
        ("lora-merge", 1, "choice", 2),
        ("lora-merge", 3, "choice", 1),
        ("lora-flat-loss", 1, "choice", 1),
        ("gone-from-the-bank", 4, "quiz", 1),
    ):
        journal.add(Review(name, rating, by, NOW - timedelta(days=days)))
    by_unit = {each.unit: each for each in choices.progress(journal)}
    lora = by_unit["02"]
    assert (lora.held, lora.seen, lora.right, lora.chosen) == (1, 1, 1, 2)
    assert lora.questions == sum(item.unit == "02" for item in bank.items())
    assert (by_unit["01"].held, by_unit["01"].seen, by_unit["01"].chosen) == (0, 0, 0)
    figure = pictures.draw_progress(list(by_unit.values()))
    assert [text.get_text() for text in figure.axes[1].texts].count("1/2") == 1
    plt.close(figure)


def test_figures_are_drawn():
    for figure in (pictures.draw_bank(bank.items()), pictures.draw_fading()):
        assert all(axes.get_xlabel() for axes in figure.axes)
        plt.close(figure)


def test_waits_grow():
    waits, known = pictures.rated([3, 3, 3])
    assert waits[0] < waits[1] < waits[2] and known.times == 3


def test_the_notebook_is_committed_without_anybodys_progress():
    notebook = read(ROOT / "notebooks" / "15_interview.ipynb")
    outputs = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "0 questions asked so far, 0 of them held; 0 choices\n" in outputs
