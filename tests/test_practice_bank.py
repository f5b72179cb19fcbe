"""The bank as one chooses from it, and answers that are computed by a process of their own."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from practice_helpers import ENTRIES, entry, use_bank

from course import ROOT, interview
from course.practice import answers as answering
from course.practice import bank
from course.practice.answers import Answers
from course.units import CourseError


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    return use_bank(tmp_path, monkeypatch)


def names(**chosen) -> list[str]:
    return [item.id for item in bank.chosen(bank.choice(**chosen))]


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, [each["id"] for each in ENTRIES]),
        ({"units": ["00"]}, ["first-concept"]),
        ({"kinds": ["estimate", "design"]}, ["an-estimate", "a-design"]),
        ({"roles": ["research"]}, ["second-concept", "a-derivation"]),
        ({"frequencies": ["rare", "sometimes"]}, ["first-concept", "an-estimate"]),
        ({"difficulty": "4"}, ["second-concept"]),
        ({"difficulty": "1-2", "kinds": ["concept"]}, ["first-concept"]),
    ],
)
def test_each_filter_takes_what_it_says(chosen, expected):
    assert names(**chosen) == expected


@pytest.mark.parametrize(
    "chosen, words",
    [
        ({"kinds": ["essay"]}, "--kind 'essay' is not known; take one of concept, derivation"),
        ({"roles": ["boss"]}, "--role 'boss'"),
        ({"frequencies": ["never"]}, "--frequency 'never'"),
        ({"difficulty": "6"}, "--difficulty '6' must be a number from 1 to 5 or a range such as 2-4"),
        ({"difficulty": "4-2"}, "--difficulty '4-2'"),
        ({"units": ["00"], "kinds": ["design"]}, "the bank has no questions yet for unit 00, kind design"),
    ],
)
def test_what_cannot_be_chosen_is_said(chosen, words):
    with pytest.raises(CourseError, match=words.replace("(", r"\(")):
        names(**chosen)


def test_a_case_says_what_to_type():
    items = {item.id: item for item in bank.items()}
    assert "course case 01_alpha_forgotten --check FILE" in items["a-case"].how
    assert "`course check 02`" in items["a-task"].how and "exercise 1" in items["a-task"].how
    assert items["an-estimate"].how == ""


def test_the_real_bank_can_be_chosen_from(monkeypatch):
    monkeypatch.undo()
    items = bank.items()
    assert len(items) == len({item.id for item in items}) >= 147
    assert {item.kind for item in items} <= set(interview.KINDS)


def test_an_answer_is_what_the_bank_says_and_is_kept(data):
    with Answers() as answers:
        answers.ask("a-design")
        question = answers.get("a-design")
    assert question == interview.question(*next(each for each in bank.written() if each[1]["id"] == "a-design"))
    assert question.deep == r"Deep on a-design: $\sigma_{r} \le 1$." and len(question.rubric) == 4
    (kept,) = (data / "cache" / "answers").rglob("*.json")
    with Answers() as again:
        again.ask("a-design")
        assert again.ready("a-design") and again.get("a-design") == question and again._process is None
    kept.write_text("{torn")
    with Answers() as damaged:
        assert damaged.get("a-design") == question


def test_a_changed_bank_is_computed_anew(data, tmp_path, monkeypatch):
    with Answers() as answers:
        assert answers.get("first-concept").short == "Short on first-concept."
    use_bank(tmp_path, monkeypatch, [entry("first-concept", "concept", unit="00", short="Another."), *ENTRIES[1:]])
    with Answers() as answers:
        assert answers.get("first-concept").short == "Another."
    assert len(list((data / "cache" / "answers").iterdir())) == 1, "what an earlier bank gave is gone"


@pytest.mark.parametrize(
    "claims, words",
    [({"n": "no_such:thing"}, "the answer to 'broken' could not be computed: ValueError: claim"), (None, "the bank has no such question")],
)
def test_an_answer_that_cannot_be_computed_says_why(tmp_path, monkeypatch, claims, words):
    if claims:
        use_bank(tmp_path, monkeypatch, [entry("broken", "concept", short="{n:.0f}", claims=claims), *ENTRIES])
    with Answers() as answers:
        with pytest.raises(CourseError, match=words):
            answers.get("broken")
        assert answers.get("an-estimate").kind == "estimate", "and the next one is answered"


def test_a_process_that_dies_is_said(monkeypatch):
    with Answers() as answers:
        answers.get("an-estimate")
        answers._process.kill()
        answers._process.wait()
        with pytest.raises(CourseError, match="its process ended"):
            answers.get("a-design")


def test_the_process_ends_with_its_parent():
    code = (
        f"from course import interview\nimport pathlib\ninterview.FOLDER = pathlib.Path({str(interview.FOLDER)!r})\n"
        "from course.practice.answers import Answers\nimport os, signal\n"
        "answers = Answers(); answers.get('an-estimate'); print(answers._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "COURSE_DATA": "/dev/null/none"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from course import interview\nimport pathlib\ninterview.FOLDER = pathlib.Path({str(interview.FOLDER)!r})\n{code}",
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    pid = int(done.stdout)
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there: {state}")


def test_its_process_speaks_json_alone(tmp_path):
    """What a claim prints does not get between."""
    done = subprocess.run(
        [sys.executable, "-m", "course.practice.answers", str(interview.FOLDER)],
        input="an-estimate\nnone\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["question"]["id"] == "an-estimate" and "no such question" in second["error"]
    assert set(first["question"]) == {field.name for field in dataclasses.fields(interview.Question)}
    assert answering._question(first["question"]).role == ("applied",)
