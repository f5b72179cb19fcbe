"""A mock interview: what it is made of, how it goes in the terminal, what is said at its end."""

import sys
import time
from datetime import UTC, datetime

import pytest
from practice_helpers import RUBRIC, entry, use_bank
from rich.console import Console

from course import cli, grading
from course.notebooks import marks, read
from course.practice import bank, mock, sitting, tasks
from course.practice.journal import Journal, Review
from course.practice.memory import memory
from course.units import CourseError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TASK = tasks.Task("03.2", "A zero point", "Write it.", 3, 12, "often", ("check",))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return use_bank(tmp_path, monkeypatch)


def compose(minutes=45, chosen=None, known=None, seed=1, with_tasks=(TASK,), shuffle=False):
    return mock.compose(bank.items(), with_tasks, minutes, chosen or bank.Choice(), known or {}, seed, shuffle)


def names(plan) -> list[str]:
    return [part.name for part in plan.parts]


# what it is made of


@pytest.mark.parametrize("minutes", [30, 45, 60, 120])
@pytest.mark.parametrize("seed", range(4))
def test_one_of_each_and_together_the_minutes_that_were_asked_for(data, minutes, seed):
    plan = compose(minutes, seed=seed)
    assert sum(part.minutes for part in plan.parts) == pytest.approx(minutes)
    for kind in ("estimate", "debugging", "coding", "design"):
        assert names(plan).count(kind) <= 1
    if minutes >= 45:
        assert {"estimate", "debugging", "coding", "design"} < set(names(plan)) and plan.notes == ()
    assert names(plan)[0] in ("concept", "derivation"), "it begins with what one knows"
    assert len({part.id for part in plan.parts}) == len(plan.parts)


def test_the_same_seed_is_the_same_interview(data):
    assert compose(seed=5) == compose(seed=5)
    assert len({tuple(part.id for part in compose(seed=seed).parts) for seed in range(12)}) > 1


def test_shuffled_sections_hold_the_same_kinds(data):
    orders = {tuple(names(compose(seed=seed, shuffle=True))) for seed in range(8)}
    assert len(orders) > 2


def test_what_does_not_fit_is_left_out_in_words(data):
    plan = compose(12)
    assert "12 minutes are too short for a design as well." in plan.notes
    assert sum(part.minutes for part in plan.parts) == pytest.approx(12)
    for part in plan.parts:
        assert (part.item or part.task).minutes <= 1.3 * part.minutes + 1e-9


def test_what_the_bank_lacks_is_said(tmp_path, monkeypatch, data):
    use_bank(tmp_path, monkeypatch, [entry("only", "concept")])
    plan = compose(with_tasks=())
    assert plan.notes == tuple(
        f"The bank has no {kind} yet; its time goes to the others." for kind in ("estimate", "debugging case", "coding task", "design")
    )
    assert names(plan) == ["concept"]
    plan = compose(chosen=bank.choice(units=["02"]))
    assert any("for unit 02" in note for note in plan.notes)
    with pytest.raises(CourseError, match="there is nothing to ask for kind design"):
        compose(chosen=bank.choice(kinds=["design"]))


def test_kinds_that_are_chosen_are_the_only_ones(data):
    plan = compose(chosen=bank.choice(kinds=["estimate", "design"]))
    assert sorted(set(names(plan))) == ["design", "estimate"] and plan.notes == ()


@pytest.mark.parametrize("minutes", [9, 0, -45, 241])
def test_minutes_have_a_range(data, minutes):
    with pytest.raises(CourseError, match=f"--minutes {minutes} must be from 10 to 240"):
        compose(minutes)


def test_an_exercise_that_the_bank_asks_for_is_not_taken_twice(data):
    same = tasks.Task("02.1", "A LoRA layer", "Write it.", 2, 12, "often")
    assert all(part.item for seed in range(5) for part in compose(seed=seed, with_tasks=(same,)).parts)


def test_what_was_not_known_is_likelier(data):
    known = memory([Review("first-concept", 1, at=NOW), Review("second-concept", 4, at=NOW), Review("a-derivation", 4, at=NOW)])
    first = bank.items()[0]
    assert mock._weight(first, known) == 2 and mock._weight(first, {}) == 2
    assert mock._weight(bank.items()[1], known) == 4 and mock._weight(bank.items()[1], {}) == 8


# coding tasks


def test_every_exercise_of_the_course_is_a_task_without_hints():
    found = tasks.tasks()
    assert len(found) >= 69 and len({task.key for task in found}) == len(found)
    for task in found:
        assert task.check and task.text and "<details>" not in task.text and "Difficulty" not in task.text
        assert 1 <= task.difficulty <= 5 and 1 <= task.minutes <= 30


def test_a_sheet_holds_one_exercise_without_its_hints(tmp_path):
    (task,) = [task for task in tasks.tasks() if task.key == "02.2"]
    path = tasks.hand_out(task, tmp_path, NOW)
    assert path.name == "2026-03-01-02-2-merge-and-take-it.ipynb"
    again = tasks.hand_out(task, tmp_path, NOW)
    assert again != path and path.exists(), "never over another one"
    notebook = read(path)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "Hint" not in text and "class Unmerged" in text and "seed_everything" in text and "lora_parameters" not in text
    assert [marks(cell)["grade_id"] for cell in notebook.cells if marks(cell)] == ["merge-answer", "merge-check"]


def test_a_sheet_is_judged_by_its_own_checks(small_course, tmp_path, monkeypatch):
    task = tasks.Task("00.1", "Squares", "", 1, 1, "often", ("one-check",))
    outcomes = [grading.Outcome("one-check", "1. One", 1, "not yet"), grading.Outcome("other-check", "2. Other", 1, "missing")]
    monkeypatch.setattr(grading, "grade", lambda path, unit: grading.Report(outcomes))
    assert tasks.judged(task, tmp_path / "sheet.ipynb", small_course.root) == ["1. One: not yet"]
    monkeypatch.undo()
    (wrong,) = tasks.judged(task, tmp_path / "none.ipynb", small_course.root)
    assert "there is no file" in wrong and tasks.best_rating([wrong]) == 2 and tasks.best_rating([]) == 4


# how it goes


def test_ratings_times_and_the_rubric(data):
    plan = compose(45, with_tasks=())
    interview = mock.Interview(plan, Journal(data))
    while interview.part is not None:
        interview.spend(60 * interview.part.minutes * (2 if interview.part.name == "estimate" else 0.5))
        if interview.part.name == "design":
            interview.met[interview.at] = [True, True, False, False]
        interview.rate({"estimate": 2, "debugging": 1}.get(interview.part.name, 3))
    lines = {line.what: line for line in mock.rubric(interview)}
    assert lines["Knowledge"].share == 1 and lines["Numbers"].share == 0
    assert lines["Practice"].found == "1 of 2 good or easy" and lines["Design"].found == "2 of 4 points of the rubric"
    assert lines["Time"].share == pytest.approx(1 - 1 / len(plan.parts))
    assert [part.name for part, _ in mock.to_revise(interview)] == ["debugging", "estimate"], "worst first"
    assert all(review.by == "interview" for review in Journal(data).reviews())
    assert memory(Journal(data).reviews())["an-estimate"].last == 2, "the quiz asks it again"


@pytest.mark.parametrize(
    "ratings, words",
    [
        ([], "Nothing was rated."),
        ([3], "too few to say more"),
        ([4, 4, 4, 3, 3, 3, 4], "you are ready"),
        ([3, 3, 3, 3, 2, 3, 1], "it would do"),
        ([1, 1, 2, 3, 2, 3, 3], "not yet"),
    ],
)
def test_the_verdict_states_its_rule(data, ratings, words):
    interview = mock.Interview(compose(60), Journal(data))
    for rating in ratings[: len(interview.plan.parts)]:
        interview.rate(rating)
    assert words in mock.verdict(interview)


@pytest.mark.parametrize(
    "met, rating",
    [([False, True, True, True], 1), ([True, False, False, False], 2), ([True, True, False, False], 3), ([True] * 4, 4), ([True], 4)],
)
def test_a_design_is_rated_by_its_rubric(met, rating):
    assert mock.from_rubric(met) == rating


def test_who_comes_back_finds_their_sheet(data, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(tasks, "hand_out", lambda task, folder, now: made.append(task) or folder / f"{len(made)}.ipynb")
    interview = mock.Interview(compose(chosen=bank.choice(units=["03"], kinds=["coding"])), Journal(data))
    assert interview.sheet(tmp_path) == interview.sheet(tmp_path) == tmp_path / "1.ipynb"


def test_back_rates_anew(data):
    interview = mock.Interview(compose(45), Journal(data))
    interview.rate(1)
    interview.back()
    interview.rate(4)
    (standing,) = Journal(data).reviews()
    assert standing.rating == 4 and interview.at == 1


# in the terminal


@pytest.fixture
def course(data, monkeypatch, capsys):
    """Run the command; ``typed`` are the lines, "^C" an interruption."""

    def run(*argv, typed=()):
        lines = iter(typed)

        def read(self, prompt="", **_):
            self.print(prompt, end="")
            line = next(lines, "q")
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(Console, "input", read)
        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: typed != ()})())
        monkeypatch.setattr(sys, "argv", ["course", "interview", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    run.journal = Journal(data)
    return run


def test_in_the_terminal(course):
    kinds = [word for kind in ("estimate", "debugging", "design") for word in ("--kind", kind)]
    status, printed = course("--seed", "1", "--minutes", "30", *kinds, typed=["", "", "3", "", "2", "", "y", "y", "n", "y", ""])
    assert status == 0
    for text in (
        "A mock interview of 30 minutes (seed 1)",
        "Part 1 of 3 · estimate",
        "course case 01_alpha_forgotten",
        "Short on a-design.",
    ):
        assert text in printed
    assert "3 of 4, hence 'good'" in printed and all(line in printed for line in RUBRIC)
    assert "3 of 4 points of the rubric" in printed and "3 of 3 parts rated, 2.7 of 4 on average: it would do" in printed
    assert "a-case (hard)" in " ".join(printed.split())
    assert [review.rating for review in course.journal.reviews()] == [3, 2, 3]


@pytest.mark.parametrize("last, expected", [("q", 0), ("^C", 130)])
def test_what_was_rated_stays_when_it_ends_early(course, last, expected):
    status, printed = course("--kind", "estimate", "--kind", "design", typed=["", "", "4", last])
    assert status == expected and "Traceback" not in printed
    assert [(review.question, review.rating) for review in course.journal.reviews()] == [("an-estimate", 4)]


def test_skip_and_back(course):
    _, printed = course("--kind", "estimate", "--kind", "design", typed=["", "s", "b", "", "3", "q"])
    assert printed.count("Part 1 of 2") == 2 and len(course.journal.reviews()) == 1


def test_a_coding_task_is_judged_and_a_wrong_one_is_hard_at_best(course, monkeypatch):
    monkeypatch.setattr(tasks, "tasks", lambda: [TASK])
    monkeypatch.setattr(tasks, "hand_out", lambda task, folder, now: folder / "sheet.ipynb")
    monkeypatch.setattr(tasks, "judged", lambda task, sheet: ["2. A zero point: nothing here yet"])
    _, printed = course("--unit", "03", "--kind", "coding", typed=["", "", "4", "2"])
    assert "interviews/sheet.ipynb" in printed and "✗ 2. A zero point: nothing here yet" in printed and "1–2: rate" in printed
    assert "'4' is not one of the keys." in printed
    (review,) = course.journal.reviews()
    assert (review.question, review.rating) == ("exercise:03.2", 2)
    assert "course check 03" in printed


def test_without_a_terminal_it_says_what_to_use(course):
    status, printed = course()
    assert status == 2 and "an interview needs a terminal" in printed


def test_the_clock_runs_while_one_answers_and_says_when_it_is_over(data, monkeypatch, capsys):
    console = Console(width=80)
    interview = mock.Interview(compose(45), Journal(data))
    now = [0.0]
    monkeypatch.setattr(sitting.time, "monotonic", lambda: now[0])
    with sitting._ticking(interview, console):
        now[0] = 95.0
    assert interview.used == 95.0 and sitting.clock(interview.used) == "1:35"
    interview.seconds[0] = 60 * interview.part.minutes - 0.02
    with sitting._ticking(interview, console):
        monkeypatch.undo()
        time.sleep(0.2)
    assert "minutes of this part are over" in capsys.readouterr().out


def test_the_real_bank_gives_an_interview():
    plan = mock.compose(bank.items(), tasks.tasks(), 45, bank.Choice(), {}, 3)
    assert sum(part.minutes for part in plan.parts) == pytest.approx(45)
    assert "coding" in names(plan)


def test_a_question_that_asks_for_an_exercise_hands_out_its_sheet(course, monkeypatch):
    same = tasks.Task("02.1", "A LoRA layer", "Write the layer.", 2, 12, "often", ("check",))
    monkeypatch.setattr(tasks, "tasks", lambda: [same])
    monkeypatch.setattr(tasks, "hand_out", lambda task, folder, now: folder / "sheet.ipynb")
    monkeypatch.setattr(tasks, "judged", lambda task, sheet: [])
    _, printed = course("--kind", "coding", typed=["", "", "4"])
    for text in ("What about a-task?", "Write the layer.", "interviews/sheet.ipynb", "✓ right", "Short on a-task.", "1–4: rate"):
        assert text in printed
    assert [review.question for review in course.journal.reviews()] == ["a-task"]
