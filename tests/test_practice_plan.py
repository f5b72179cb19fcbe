"""`course plan`: what fits into the days, what comes back on which, and the files it writes."""

import re
import sys
from datetime import UTC, date, datetime

import pytest
from practice_helpers import use_bank

from course import cli
from course.practice import bank, plan, tasks
from course.practice.journal import Review
from course.practice.memory import memory
from course.practice.plan import ESSENTIAL, REST, USEFUL, Step
from course.units import CourseError, select

FIRST = date(2026, 3, 2)  # a Monday


@pytest.fixture(scope="module")
def todo():
    return plan.steps(select(None), bank.items(), tasks.tasks(), {})


def made(todo, days=14, minutes=60, reviews=()):
    return plan.make(todo, bank.items(), reviews, days, minutes, FIRST)


def test_all_there_is_to_do_is_a_step_with_its_minutes(todo):
    units = [unit for unit in select(None) if unit.number != "15"]
    headings = [unit.lesson.read_text(encoding="utf-8").splitlines()[0] for unit in units]
    assert "# 11 · Many adapters" in headings
    assert [step.what for step in todo if step.what.startswith("read lesson")][: len(units)] == [
        f"read lesson {heading.removeprefix('# ').replace(' · ', ', ')}" for heading in headings
    ]
    assert {step.question for step in todo} - {""} == {item.id for item in bank.items()}
    assert {step.rank for step in todo} <= {ESSENTIAL, USEFUL, REST} and all(step.minutes > 0 for step in todo)


@pytest.mark.parametrize("days, minutes", [(1, 60), (3, 30), (14, 60), (60, 120)])
def test_no_day_is_too_full_and_nothing_is_lost(todo, days, minutes):
    planned = made(todo, days, minutes)
    assert [day.on for day in planned.days] == [date.fromordinal(FIRST.toordinal() + n) for n in range(days)]
    assert all(day.minutes <= 1.1 * minutes for day in planned.days)
    done = [step for day in planned.days for step in day.steps if "mock interview" not in step.what]
    assert sorted(map(id, [*done, *planned.left_out])) == sorted(map(id, todo))


def test_with_days_enough_nothing_is_left_out(todo):
    planned = made(todo, 60, 120)
    assert planned.left_out == () and planned.left_out_words() == ""


def test_the_rare_is_left_out_first_and_every_unit_has_its_turn(todo):
    planned = made(todo, 21, 60)
    kept = {id(step) for day in planned.days for step in day.steps}
    for rank in (ESSENTIAL, USEFUL):
        this, next_one = ([id(step) in kept for step in todo if step.rank == each] for each in (rank, rank + 1))
        assert sum(this) / len(this) >= sum(next_one) / len(next_one)
    lessons = [step.unit for day in planned.days for step in day.steps if step.what.startswith("read lesson")]
    assert lessons == sorted(lessons) and len(lessons) >= 12, "the units' order"
    assert re.fullmatch(r"(\d+ questions and )?\d+ \w+.* found no place, the rarely asked first: .*", planned.left_out_words())


def test_mock_interviews_in_the_middle_and_at_the_end(todo):
    days = [n for n, day in enumerate(made(todo, 14).days) for step in day.steps if "mock interview" in step.what]
    assert days == [7, 13]
    assert [n for n, day in enumerate(made(todo, 3).days) for step in day.steps if "mock interview" in step.what] == [2]
    assert not any("mock interview" in step.what for day in made(todo, 3, 30).days for step in day.steps)


def test_new_questions_come_back_on_later_days():
    name = bank.items()[0].id
    planned = made([Step("00", name, 3, ESSENTIAL, name)], 14)
    again = [n for n, day in enumerate(planned.days) if name in day.again]
    assert planned.days[0].steps[0].question == name and again[0] in (2, 3) and len(again) == 2
    assert planned.days[again[0]].again_minutes == pytest.approx(bank.items()[0].minutes / 3)


def test_what_was_learned_before_comes_back_too():
    name = bank.items()[0].id
    reviews = [Review(name, 3, at=datetime(2026, 2, 20, 12, tzinfo=UTC))]
    assert made([], 5, reviews=reviews).days[0].again == [name]
    assert all(step.question != name for step in plan.steps(select(None), bank.items(), [], memory(reviews)))


@pytest.mark.parametrize(
    "days, minutes, words", [(0, 60, "--days 0"), (366, 60, "--days 366"), (7, 5, "--minutes 5"), (7, 721, "--minutes 721")]
)
def test_days_and_minutes_have_a_range(days, minutes, words):
    with pytest.raises(CourseError, match=words):
        made([], days, minutes)


def test_the_page_has_a_box_for_every_line(todo):
    planned = made(todo, 3)
    text = plan.markdown(planned)
    assert text.startswith("# 3 days until the interview\n") and "## Day 1: Monday 2 March (" in text
    assert text.count("- [ ] ") == sum(len(day.lines()) for day in planned.days)


def test_the_calendar_keeps_the_rules_of_its_format(todo):
    planned = made(todo, 5)
    text = plan.calendar(planned)
    lines = text.split("\r\n")
    assert lines[0] == "BEGIN:VCALENDAR" and lines[-2:] == ["END:VCALENDAR", ""] and "\n" not in text.replace("\r\n", "")
    assert all(len(line.encode()) <= 75 for line in lines)
    whole = text.replace("\r\n ", "")
    assert whole.count("BEGIN:VEVENT") == whole.count("END:VEVENT") == 5
    assert "DTSTART:20260302T190000" in whole and len(set(re.findall(r"UID:(.+)\r", whole))) == 5
    described = re.findall(r"DESCRIPTION:(.+)\r\n", whole)
    assert [part.replace("\\n", "\n").replace("\\,", ",").replace("\\;", ";") for part in described] == [
        "\n".join(d.lines()) for d in planned.days
    ]


def test_no_letter_is_cut_where_a_line_is_folded():
    folded = plan._folded("DESCRIPTION:" + "α" * 200)
    assert folded.replace("\r\n ", "") == "DESCRIPTION:" + "α" * 200


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    use_bank(tmp_path, monkeypatch)

    def course(*argv):
        monkeypatch.setattr(sys, "argv", ["course", "plan", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    status, printed = course("--days", "3", "--unit", "lora", "--save", str(tmp_path / "plan.ics"))
    assert status == 0 and "read lesson 02, LoRA" in printed and "lesson 03" not in printed
    assert "course quiz 02 --new" in printed and "mock interview" in printed
    assert (tmp_path / "plan.ics").read_bytes().startswith(b"BEGIN:VCALENDAR\r\n")
    course("--days", "3", "--save", str(tmp_path / "plan.md"))
    assert "- [ ] read lesson" in (tmp_path / "plan.md").read_text()
    status, printed = course("--save", str(tmp_path / "plan.pdf"))
    assert status == 2 and "must end in .ics" in " ".join(printed.split())
