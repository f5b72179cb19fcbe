"""`course quiz`: what is asked and in which order, what can be typed, and that nothing is lost."""

import contextlib
import dataclasses
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from practice_helpers import ENTRIES, entry, use_bank
from rich.console import Console

from course import ROOT, cli, interview
from course.practice import bank, commands, quiz, words
from course.practice.answers import Answers
from course.practice.journal import Journal, Review
from course.practice.memory import memory

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
IDS = [each["id"] for each in ENTRIES]


@pytest.fixture
def data(tmp_path, monkeypatch):
    return use_bank(tmp_path, monkeypatch)


@pytest.fixture
def course(data, monkeypatch, capsys):
    """Run the command, with what is typed; returns (exit status, what it printed)."""

    def run(*argv: str, typed: list[str] | None = None) -> tuple[int, str]:
        lines = iter(typed or [])

        def read(self, prompt="", **_):
            self.print(prompt, end="")
            line = next(lines, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(Console, "input", read)
        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: typed is not None})())
        monkeypatch.setattr(sys, "argv", ["course", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    run.journal = Journal(data)
    return run


def ids(items) -> list[str]:
    return [item.id for item in items]


# the order


def test_what_is_due_comes_first_and_new_questions_are_few(data):
    items = bank.items()
    asked = [Review(IDS[4], 3, at=NOW - timedelta(days=9)), Review(IDS[5], 3, at=NOW - timedelta(days=30)), Review(IDS[6], 3, at=NOW)]
    known = memory(asked)
    assert ids(quiz.order(items, known, NOW, new=2)) == [IDS[5], IDS[4], IDS[0], IDS[1]], "the least remembered first"
    assert ids(quiz.order(items, known, NOW, new=0)) == [IDS[5], IDS[4]]
    mixed = quiz.order(items, {}, NOW, 9, random.Random(1))
    assert sorted(ids(mixed)) == sorted(IDS) and ids(mixed) != IDS
    assert mixed == quiz.order(items, {}, NOW, 9, random.Random(1))


def test_what_was_not_known_waits_its_minutes(data):
    known = memory([Review(IDS[0], 1, at=NOW)])
    assert quiz.order(bank.items(), known, NOW + timedelta(minutes=5), new=0) == []
    assert ids(quiz.order(bank.items(), known, NOW + timedelta(minutes=11), new=0)) == [IDS[0]]


def test_a_session_goes_back_and_rates_anew(data):
    session = quiz.Session(bank.items()[:3], Journal(data))
    session.rate(3)
    session.skip()
    session.back()
    session.back()
    assert session.item.id == IDS[0] and session.skipped == {1}
    session.rate(4, seconds=9)
    (standing,) = Journal(data).reviews()
    assert standing.rating == 4 and standing.seconds == 9 and session.count() == {4: 1}
    session.rate(2)
    assert session.skipped == set() and len(session.queue) == 3


def test_again_is_asked_once_more_at_the_end(data):
    session = quiz.Session(bank.items()[:2], Journal(data))
    session.rate(1)
    assert ids(session.queue) == [*IDS[:2], IDS[0]]
    session.rate(3)
    session.rate(1)
    assert ids(session.queue) == [*IDS[:2], IDS[0], IDS[0]]
    session.rate(3)
    assert session.item is None


# the command


def test_the_answer_comes_in_steps(course):
    status, printed = course("quiz", "00", typed=["", "", "", "", "3"])
    assert status == 0
    shown = [
        "What about first-concept?",
        "Short on first-concept.",
        "Deep on first-concept: σᵣ ≤ 1.",
        "And then?",
        "The wrong one.",
        "again in",
    ]
    places = [printed.index(text) for text in shown]
    assert places == sorted(places)
    assert "1 of 1 · new" in printed and "1 rated: 1 good" in printed and "The next question is due in 2 days" in printed
    (review,) = course.journal.reviews()
    assert (review.question, review.rating, review.by) == ("first-concept", 3, "quiz") and review.seconds >= 0


def test_a_rating_may_come_early_and_by_name(course):
    _, printed = course("quiz", "--new", "2", typed=["", "4", "", "hard"])
    assert [review.rating for review in course.journal.reviews()] == [4, 2]
    assert "2 rated: 1 hard, 1 easy" in printed and "Deep on" not in printed
    assert "Unit 02: 1 to revise" in printed


def test_keys_that_are_none_are_said_and_asked_again(course):
    _, printed = course("quiz", "00", typed=["3", "x", "", "7", "3"])
    assert "'3' is not one of the keys. A rating comes after the short answer." in printed.replace("\n", " ")
    assert len(course.journal.reviews()) == 1


def test_skip_back_and_quit(course):
    _, printed = course("quiz", "--new", "2", typed=["s", "b", "", "3", "q"])
    assert [review.question for review in course.journal.reviews()] == [IDS[0]]
    assert printed.count("What about first-concept?") == 2
    status, printed = course("quiz", "--all", typed=["q"])
    assert status == 0 and "Nothing was rated." in printed


@pytest.mark.parametrize("end, expected", [("^C", 130), (None, 0)])
def test_ctrl_c_and_the_end_of_input_keep_what_was_rated(course, end, expected):
    status, printed = course("quiz", typed=["", "3", ""] + ([end] if end else []))
    assert status == expected and "Traceback" not in printed
    assert [review.question for review in course.journal.reviews()] == [IDS[0]]


def test_a_case_says_which_command_to_run(course):
    _, printed = course("quiz", "--kind", "debugging", typed=["q"])
    assert "course case 01_alpha_forgotten" in printed


def test_when_nothing_is_due_it_says_when(course):
    course("quiz", "00", typed=["", "4"])
    status, printed = course("quiz", "00", typed=[])
    assert status == 0 and "Nothing is due now; the next question in 8 days. `--all` asks all the same." in printed.replace("\n", " ")
    _, printed = course("quiz", "00", "--all", typed=["q"])
    assert "seen 1×" in printed


def test_a_damaged_journal_is_named(course):
    course("quiz", "00", typed=["", "4"])
    with course.journal.path.open("a") as file:
        file.write("nonsense\n")
    _, printed = course("quiz", "--new", "1", typed=["q"])
    assert "1 line of reviews.jsonl could not be read" in printed.replace("\n", " ")


def test_an_answer_that_cannot_be_computed_is_said_and_the_next_one_asked(course, tmp_path, monkeypatch):
    use_bank(tmp_path, monkeypatch, [entry("broken", "concept", deep="{n:.0f}", claims={"n": "no_such:thing"}), entry("whole", "concept")])
    _, printed = course("quiz", typed=["", "", "", "", "3"])
    assert "the answer to 'broken' could not be computed" in printed.replace("\n", " ")
    assert [review.question for review in course.journal.reviews()] == ["whole"]


def test_a_name_that_does_not_exist_lists_those_that_do(course):
    status, printed = course("quiz", "70", typed=[])
    assert status == 2 and "Traceback" not in printed
    assert "there is no unit '70'" in printed and "02 (lora)" in printed.replace("\n", " ")


# all at once, and without a terminal


def test_questions_and_answers_at_once(course):
    status, printed = course("quiz", "lora", "--kind", "design", "--answers")
    assert status == 0
    for text in (
        "What about a-design?",
        "1 of 1",
        "●●○○○",
        "Short on",
        "Deep on",
        "And then?",
        "Names what it gives up.",
        "Because it is.",
    ):
        assert text in printed


def test_a_unit_without_questions_says_so(course):
    status, printed = course("quiz", "05", "--answers")
    assert status == 2 and "the bank has no questions yet for unit 05" in printed


def test_without_a_terminal_it_gives_nothing_away(course):
    status, printed = course("quiz")
    assert status == 0 and "What about first-concept?" in printed and "Short on" not in printed


def test_formulas_that_a_terminal_can_show(course, tmp_path, monkeypatch):
    deep = r"$\sigma_{{i+r}}(W) \le 2\sqrt{{128}}$, and $g_t x_t^\top$; it costs $5."
    use_bank(tmp_path, monkeypatch, [entry("formulas", "concept", deep=deep)])
    assert "σᵢ₊ᵣ(W) ≤ 2√(128), and gₜ xₜᵀ; it costs $5." in course("quiz", "--answers")[1]


def test_help_names_the_commands(course):
    status, printed = course("--help")
    assert status == 0
    for command in ("quiz", "interview", "plan", "anki"):
        assert f" {command} " in printed and course(command, "--help")[0] == 0


def test_what_is_imported_for_the_first_question_is_light():
    code = (
        "import sys\nimport course.cli\nfrom course.practice import answers, bank, quiz, mock, sitting, tasks\n"
        "bank.items(); tasks.tasks()\n"
        "heavy = {'torch', 'transformers', 'nbformat', 'nbgrader', 'matplotlib', 'IPython', 'textual'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


# a real terminal


class Terminal:
    """`python -m course ...` on a terminal of its own."""

    def __init__(self, data, *argv: str) -> None:
        pid, self.file = pty.fork()
        if pid == 0:
            os.environ |= {"COURSE_DATA": str(data), "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PYTHONPATH": str(ROOT)}
            os.execv(sys.executable, [sys.executable, "-m", "course", *argv])
        self.pid, self.seen = pid, ""

    def until(self, text: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen and time.monotonic() < end:
            if select.select([self.file], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.file, 65536).decode(errors="replace")
        assert text in self.seen, self.seen

    def type(self, line: str) -> None:
        self.seen = ""
        os.write(self.file, line.encode() + b"\n")

    def end(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.file)
        return os.waitstatus_to_exitcode(status)


def test_in_a_real_terminal_a_kill_keeps_what_was_rated(tmp_path):
    """The course's own bank. No library warns, and the first question is there before its numbers are."""
    terminal = Terminal(tmp_path, "quiz", "02", "--new", "2")
    terminal.until("Enter")
    assert "Write down LoRA" in terminal.seen and "Warning" not in terminal.seen
    terminal.type("")
    terminal.until("In 30 seconds")
    terminal.type("3")
    terminal.until("2 of 2")
    assert [review.question for review in Journal(tmp_path).reviews()] == ["lora-on-a-whiteboard"]
    os.kill(terminal.pid, signal.SIGKILL)
    assert terminal.end() == -signal.SIGKILL
    assert len(Journal(tmp_path).reviews()) == 1


def test_ratings_and_words_agree():
    table = words.ratings({number: timedelta(days=number) for number in (1, 2, 3, 4)})
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table)
    assert [line.split()[:2] for line in captured.get().splitlines()] == [["1", "again"], ["2", "hard"], ["3", "good"], ["4", "easy"]]
    assert "again in 4 days" in captured.get()


def test_commands_and_bank_name_the_same_words():
    """The help texts, against what the bank knows."""
    for option, known in ((commands.Kind, interview.KINDS), (commands.Role, interview.ROLES), (commands.Frequency, interview.FREQUENCIES)):
        (declared,) = option.__metadata__
        assert all(word in declared.help for word in known)


def test_items_agree_with_the_questions_they_become(data):
    with Answers() as answers:
        for item in bank.items():
            question = answers.get(item.id)
            for field in dataclasses.fields(bank.Item):
                if field.name not in ("text", "short"):
                    assert getattr(item, field.name) == getattr(question, field.name)
            assert item.asked_at_once == question.question and item.answered_at_once == question.short
