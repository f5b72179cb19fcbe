"""Numbers in prose are held by code: every claim runs, every page is fresh, every question loads."""

import functools
import importlib
import math
import pkgutil
import re
import time
from pathlib import Path

import pytest
import yaml

import course.claims
from course import ROOT, claimed, interview
from course.units import units

PAGES = [path for path in claimed.pages() if path.exists()]
BANKS = sorted(interview.FOLDER.glob("*.yaml"))
CHOICES = sorted((interview.FOLDER / "choices").glob("*.yaml"))


def written_claims() -> list[str]:
    """ "svd:rank_of_update" for every public function written in course/claims, but for those that only help."""
    found = []
    for info in pkgutil.iter_modules(course.claims.__path__):
        if info.name == "shared":
            continue
        module = importlib.import_module(f"course.claims.{info.name}")
        found += [
            f"{info.name}:{name}"
            for name, value in vars(module).items()
            if callable(value)
            and not name.startswith("_")
            and getattr(value, "__module__", "") == module.__name__
            and not isinstance(value, type)
        ]
    return found


@functools.cache  # reading the bank takes a second, and there is a test for each function
def claims_in_use() -> set[str]:
    used = {name for path in PAGES for name in claimed.in_page(path.read_text(encoding="utf-8"))}
    for path in CHOICES:
        used |= {claim for item in yaml.safe_load(path.read_text(encoding="utf-8")).values() for claim in item["claims"].values()}
    return used | {
        claim for path in BANKS for entry in yaml.safe_load(path.read_text(encoding="utf-8")) for claim in entry["claims"].values()
    }


@pytest.mark.parametrize("name", sorted(claims_in_use()))
def test_every_claim_holds_and_is_quick(name):
    began = time.process_time()
    value = claimed.value(name)
    assert time.process_time() - began < 10, "a claim takes below two seconds; measure long ones once and record them"
    assert value is True or math.isfinite(value)


@pytest.mark.parametrize("name", written_claims())
def test_every_claim_is_used(name):
    module, _, function = name.partition(":")
    used = {":".join(claimed.parse(claim)[:2]) for claim in claims_in_use()}
    assert name in used or _helps(module, function), "no page and no question states it"


def _helps(module: str, function: str) -> bool:
    text = (ROOT / "course" / "claims" / f"{module}.py").read_text(encoding="utf-8")
    return len(re.findall(rf"\b{function}\b", text)) > 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_fresh(path: Path):
    text = path.read_text(encoding="utf-8")
    assert claimed.refresh(text) == text, "run `course build`"


@pytest.mark.parametrize("path", BANKS, ids=lambda path: path.name)
def test_questions_load_and_say_where_they_come_from(path: Path):
    unit = path.stem[:2]
    found = interview.questions(unit)
    assert path.stem in {unit.stem for unit in units()}
    for question in found:
        assert question.unit == unit
        assert 1 <= question.difficulty <= 5 and question.minutes > 0
        for source in question.sources:
            assert re.fullmatch(r"S[0-4]\.\S+", source), f"{question.id}: {source}"
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", question.id)
        for text in (question.question, question.short, question.deep, question.wrong_answer, question.wrong_why, *question.follow_ups):
            assert text.strip() and not re.search(r"\bTODO\b", text)
        assert len(question.short.split()) <= 120, f"{question.id}: the short answer takes more than 30 seconds to say"
        assert question.follow_ups and all("(" in text for text in question.follow_ups), f"{question.id}: follow-ups carry their answers"


def test_no_formula_of_the_questions_stays_latex():
    for question in interview.questions():
        for text in (question.question, question.short, question.deep, question.wrong_answer, question.wrong_why, *question.follow_ups):
            shown = interview.in_terminal(text)
            assert "$" not in shown and not re.search(r"\\[a-zA-Z]+", shown), shown


def test_ids_are_unique_in_the_whole_course():
    ids = [question.id for question in interview.questions()]
    assert len(ids) == len(set(ids))


# the machinery of claims


@pytest.fixture
def claims(monkeypatch):
    """Claims of a module that exists in this test only."""
    import sys
    import types

    module = types.ModuleType("course.claims.made_up")
    module.half, module.sure, module.many, module.low = lambda: 0.5, lambda: True, lambda: 1234567, lambda: -2.25
    module.scaled = lambda by, times=1: by * times
    module.text, module.false, module.nothing = lambda: "0.5", lambda: False, lambda: None
    monkeypatch.setitem(sys.modules, "course.claims.made_up", module)
    monkeypatch.setattr(course.claims, "made_up", module, raising=False)
    claimed.value.cache_clear()
    yield "made_up"
    claimed.value.cache_clear()


def test_a_claim_gives_a_number_or_holds(claims):
    assert claimed.value("made_up:half") == 0.5
    assert claimed.value("made_up:sure") is True


def test_a_claim_takes_literals(claims):
    assert claimed.value("made_up:scaled(3)") == 3
    assert claimed.value("made_up:scaled(0.5, times=-4)") == -2
    page = "0.0 <!--claim made_up:scaled(3, times=2) .1f--> and 1 <!--claim made_up:half .2f-->"
    assert claimed.refresh(page) == "6.0 <!--claim made_up:scaled(3, times=2) .1f--> and 0.50 <!--claim made_up:half .2f-->"
    assert claimed.in_page(page) == ["made_up:scaled(3, times=2)", "made_up:half"]
    with pytest.raises(TypeError, match="missing 1 required"):
        claimed.value("made_up:scaled")


@pytest.mark.parametrize(
    "call", ["made_up", "made_up:scaled(3", "made_up:scaled(half)", "made_up:scaled(3)(4)", "made_up:scaled + 1", ":half"]
)
def test_a_claim_that_is_no_call_is_refused(claims, call):
    with pytest.raises(ValueError, match="must read module:function"):
        claimed.value(call)


@pytest.mark.parametrize("name", ["text", "false", "nothing"])
def test_a_claim_that_gives_anything_else_is_refused(claims, name):
    with pytest.raises(TypeError, match=f"claim 'made_up:{name}' returned"):
        claimed.value(f"made_up:{name}")


@pytest.mark.parametrize("name, words", [("half", "must read module:function"), ("made_up:absent", "absent"), ("absent:half", "absent")])
def test_a_claim_that_does_not_exist_is_refused(claims, name, words):
    with pytest.raises(ValueError, match=words):
        claimed.value(name)


@pytest.mark.parametrize(
    "before, after",
    [
        ("0.1 <!--claim made_up:half .3f-->", "0.500 <!--claim made_up:half .3f-->"),
        ("**7** <!--claim made_up:half .1f--> bits", "**0.5** <!--claim made_up:half .1f--> bits"),
        ("1,000<!--claim made_up:many ,-->", "1,234,567<!--claim made_up:many ,-->"),
        ("about 40 % <!--claim made_up:half .0e-->", None),  # a space before the % hides the number
        ("40% <!--claim made_up:many .2e--> x", "1.23e+06% <!--claim made_up:many .2e--> x"),
        ("1.2e+05 <!--claim made_up:many .1e-->", "1.2e+06 <!--claim made_up:many .1e-->"),
        ("−1.0 <!--claim made_up:low .1f-->", "-2.2 <!--claim made_up:low .1f-->"),
        (
            "1 <!--claim made_up:half .1f--> and 2 <!--claim made_up:low .2f-->",
            "0.5 <!--claim made_up:half .1f--> and -2.25 <!--claim made_up:low .2f-->",
        ),
        ("no claims 12", "no claims 12"),
        ("a word <!--claim made_up:half .1f-->", None),
        ("1 <!--claim made_up:half-->", None),
    ],
)
def test_pages_take_their_numbers_from_claims(claims, before, after):
    if after is None:
        with pytest.raises(ValueError, match="must follow a number directly"):
            claimed.refresh(before)
    else:
        assert claimed.refresh(before) == after
        assert claimed.refresh(after) == after


ENTRY = """
- id: small-question
  question: What is half of {many:,}?
  kind: concept
  frequency: often
  role: [applied]
  difficulty: 2
  minutes: 1
  unit: "00"
  sources: [S1.2]
  short: A half is {half:.2f}, $x_{{i}}$ aside.
  deep: Deeper.
  follow_ups: ["And a quarter? ({half:.1f} of a half)"]
  wrong: {answer: All of it., why: It is not.}
  claims: {half: "made_up:half", many: "made_up:many", holds: "made_up:sure"}
"""


@pytest.fixture
def bank(tmp_path: Path, monkeypatch, claims):
    monkeypatch.setattr(interview, "FOLDER", tmp_path)

    def load(text: str, unit: str | None = None):
        (tmp_path / "00_small.yaml").write_text(text)
        interview.questions.cache_clear()
        return interview.questions(unit)

    yield load
    interview.questions.cache_clear()


def test_a_question_has_its_numbers_filled_in(bank):
    (question,) = bank(ENTRY)
    assert question.question == "What is half of 1,234,567?"
    assert question.short == "A half is 0.50, $x_{i}$ aside."
    assert question.follow_ups == ("And a quarter? (0.5 of a half)",)
    assert (question.sources, question.wrong_answer) == (("S1.2",), "All of it.")
    assert bank(ENTRY, "00") == (question,) and bank(ENTRY, "01") == ()


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("  minutes: 1\n", "", "lacks minutes"),
        ("  minutes: 1\n", "  minutes: 1\n  hint: x\n", "unknown fields hint"),
        ("Deeper.", "Deeper {unknown}.", "uses unknown without a claim"),
        ("What is half of {many:,}?", "What?", "never states many"),
        ("made_up:sure", "made_up:absent", "absent"),
        ("  kind: concept\n", "", "lacks kind"),
        ("  role: [applied]\n", "", "lacks role"),
        ("kind: concept", "kind: chat", "kind must be of concept, .*got chat"),
        ("role: [applied]", "role: [applied, sales]", "role must be of research, .*got applied, sales"),
        ("role: [applied]", "role: []", "role must be of research, .*got none"),
        ("frequency: often", "frequency: 3", "frequency must be of often"),
        ("kind: concept", "kind: design", "kind design and lacks rubric"),
        ("kind: concept", "kind: coding", "kind coding and lacks case"),
    ],
)
def test_a_question_with_a_gap_is_refused(bank, old, new, words):
    with pytest.raises(ValueError, match=words):
        bank(ENTRY.replace(old, new))


def test_a_claim_that_does_not_hold_stops_the_bank(bank):
    with pytest.raises(TypeError, match="made_up:false"):
        bank(ENTRY.replace("made_up:sure", "made_up:false"))


def test_an_id_used_twice_is_refused(bank):
    with pytest.raises(ValueError, match="unique: small-question"):
        bank(ENTRY + ENTRY)
