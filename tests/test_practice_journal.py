"""Ratings: nothing is lost, by a kill, by two writers or by a damaged file; and dates follow from them alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from course import ROOT
from course.practice.journal import Journal, Review, folder, write
from course.practice.memory import end_of_today, first_time, in_words, memory
from course.units import CourseError

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_what_is_added_is_read_in_order_of_time(tmp_path):
    journal = Journal(tmp_path)
    assert journal.reviews() == [] and not journal.path.exists()
    later, sooner = Review("b", 3, at=NOON + timedelta(days=1), seconds=12.5), Review("a", 1, "interview", NOON)
    for review in (later, sooner):
        journal.add(review)
    assert Journal(tmp_path).reviews() == [sooner, later]
    assert len(journal.path.read_text().splitlines()) == 2


def test_a_rating_can_be_taken_back(tmp_path):
    journal = Journal(tmp_path)
    first = journal.add(Review("a", 1))
    second = journal.add(Review("a", 4, instead_of=first.key))
    assert journal.reviews() == [second]


@pytest.mark.parametrize("given", [{"rating": 5}, {"rating": True}, {"rating": 3, "at": datetime(2026, 1, 1)}, {"rating": 3, "key": 7}])
def test_a_review_must_be_one(given):
    with pytest.raises((TypeError, ValueError), match=r"must"):
        Review("a", **given)


def test_a_damaged_file_is_kept_aside_and_named(tmp_path):
    journal = Journal(tmp_path)
    kept = [journal.add(Review(name, 3)) for name in "ab"]
    good = journal.path.read_bytes()
    damaged = good + b'{"question": "c", "rat' + b"\n\xff\xfe\x00garbage\n[1, 2]\n"
    journal.path.write_bytes(damaged)
    assert Journal(tmp_path).reviews() == kept
    (aside,) = tmp_path.glob("reviews.damaged-*.jsonl")
    assert aside.read_bytes() == damaged, "byte for byte"
    journal.path.write_bytes(damaged)
    again = Journal(tmp_path)
    assert again.reviews() == kept and len(list(tmp_path.glob("reviews.damaged-*.jsonl"))) == 2, "never over an earlier one"
    assert "3 lines of reviews.jsonl could not be read" in again.noticed[0] and "reviews.damaged-" in again.noticed[0]
    third = again.add(Review("c", 2))
    assert Journal(tmp_path).reviews() == [*kept, third] and Journal(tmp_path).noticed == []


def test_a_line_that_was_torn_off_costs_itself_alone(tmp_path):
    """A power cut in the middle of a write: the next rating begins a line of its own."""
    journal = Journal(tmp_path)
    first = journal.add(Review("a", 3))
    with journal.path.open("ab") as file:
        file.write(b'{"question": "b", ')
    second = journal.add(Review("c", 3))
    assert journal.reviews() == [first, second]


def _write_many(where, name):
    journal = Journal(where)
    for number in range(40):
        journal.add(Review(f"{name}-{number}", 3))


def test_two_programs_may_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    journal = Journal(tmp_path)
    while any(writer.is_alive() for writer in writers):
        journal.reviews()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len({review.question for review in journal.reviews()}) == 80
    assert not list(tmp_path.glob("reviews.damaged-*"))


def test_a_kill_loses_nothing_that_was_rated(tmp_path):
    code = (
        "from course.practice.journal import Journal, Review\nimport itertools, pathlib, sys\n"
        f"journal = Journal(pathlib.Path({str(tmp_path)!r}))\n"
        "for number in itertools.count():\n    journal.add(Review(str(number), 3))\n    print(number, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(20):
        said = process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    said = [said, *process.stdout.read().split("\n")]
    process.wait()
    last = max(int(number) for number in said if number.strip())
    found = {review.question for review in Journal(tmp_path).reviews()}
    assert {str(number) for number in range(last + 1)} <= found


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match=r"there is no place for your progress.*COURSE_DATA"):
        Journal(tmp_path / "file" / "below").add(Review("a", 3))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "mine"))
    assert folder() == tmp_path / "mine"


def test_another_program_that_does_not_let_go_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("course.practice.journal.WAIT_SECONDS", 0.05)
    journal = Journal(tmp_path)
    with journal._alone(), pytest.raises(CourseError, match="another program has held"):
        Journal(tmp_path).add(Review("a", 3))


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, b"before")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(path, b"after")
    assert path.read_bytes() == b"before"


# when a question is due


def test_dates_follow_from_the_journal_alone():
    reviews = [Review("a", 3, at=NOON), Review("a", 3, at=NOON + timedelta(days=3)), Review("b", 1, at=NOON)]
    known, again = memory(reviews), memory(reversed(reviews))
    assert known == again and set(known) == {"a", "b"}
    assert known["a"].times == 2 and known["a"].last == 3
    assert known["b"].due - NOON == timedelta(minutes=10)
    assert known["a"].due > NOON + timedelta(days=10), "known twice, it comes back later"
    assert 0.89 < known["a"].chance(known["a"].due) < 0.92


def test_multiple_choice_moves_no_date():
    assert memory([Review("a", 1, "choice", NOON)]) == {}


def test_a_better_rating_waits_longer():
    waits = [first_time(rating, NOON) for rating in (1, 2, 3, 4)]
    assert waits == sorted(waits) and waits[2] >= timedelta(days=1)
    known = memory([Review("a", 3, at=NOON)])["a"]
    assert known.after(4, known.due) > known.after(3, known.due) > known.after(1, known.due)


@pytest.mark.parametrize(
    "wait, words",
    [
        ({"seconds": 5}, "1 min"),
        ({"minutes": 10}, "10 min"),
        ({"hours": 3}, "3 h"),
        ({"days": 1}, "1 day"),
        ({"days": 8}, "8 days"),
        ({"days": 91}, "3 months"),
        ({"days": 800}, "2 years"),
    ],
)
def test_waits_in_words(wait, words):
    assert in_words(timedelta(**wait)) == words


def test_today_ends_where_the_user_is(monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        assert end_of_today(datetime(2026, 3, 1, 12, tzinfo=UTC)) == datetime(2026, 3, 2, 10, 59, 59, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()
