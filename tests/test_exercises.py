"""Exercises are made from solutions, judged in a process of their own, and work in nbgrader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
from nbformat import NotebookNode, from_dict, v4
from traitlets.config import Config

from course import ROOT, build, classroom, grading
from course.hearing import Hearing
from course.notebooks import as_text, is_check, marks, read, tidy
from course.running import Limits
from course.units import CourseError, Unit, find, select, units

SOLVED = [unit for unit in units() if unit.solution.exists()]
every_unit = pytest.mark.parametrize("unit", SOLVED, ids=lambda unit: unit.stem)


@pytest.fixture
def unit(small_course: Unit) -> Unit:
    """The small course's first unit, with its exercise generated."""
    build.write(build.exercises(small_course.root))
    return small_course


# the exercises of this course


def test_exercises_are_fresh():
    """Generated from solutions/ as they are now. A learner's own work in an exercise is not held against it."""
    stale = [derived.path.name for derived in build.exercises() if not derived.fresh and not (derived.worked_in and _started_from(derived))]
    assert stale == [], "run `course build`"


def _started_from(derived: build.Derived) -> bool:
    if derived.now is None or derived.right is None:
        return False
    now, right = json.loads(derived.now), json.loads(derived.right)
    return now["metadata"].get("course", {}).get("content") == right["metadata"]["course"]["content"] and _changed_here(derived.path)


def _changed_here(path: Path) -> bool:
    """Whether git sees a change that is not committed: committed exercises must be generated ones."""
    answer = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "--", str(path)], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.strip() != ""


@every_unit
def test_no_answer_is_left_in_an_exercise(unit: Unit):
    made = build.exercise(read(unit.solution))
    text = as_text(made)
    assert "BEGIN SOLUTION" not in text and "solution-only" not in text
    for cell in made.cells:
        if marks(cell).get("solution"):
            assert "raise NotImplementedError()" in cell.source
            compile(cell.source, marks(cell)["grade_id"], "exec")
        assert not cell.get("outputs")


# how an exercise is made


def test_an_exercise_holds_the_stub_and_not_the_answer(unit: Unit):
    made = read(unit.exercise)
    sources = [cell.source for cell in made.cells]
    assert "def square(x):\n    # your answer here\n    raise NotImplementedError()" in sources
    assert "check.square(square)" in sources
    assert not any("Discussion" in source or "x * x" in source for source in sources)
    checks = [cell for cell in made.cells if is_check(cell)]
    assert all(cell.metadata.editable is False and cell.metadata.deletable is False for cell in checks)
    assert [marks(cell)["points"] for cell in checks] == [1, 2]
    assert set(made.metadata) == {"kernelspec", "language_info", "course"}


def test_making_it_twice_gives_the_same_file_also_when_ids_and_times_differ(unit: Unit):
    text = unit.exercise.read_text()
    solution = read(unit.solution)
    for number, cell in enumerate(solution.cells):
        cell.id = f"other-{number}"
        cell.metadata["execution"] = {"iopub.status.busy": f"2030-01-01T00:00:{number:02}"}
    solution.metadata["language_info"] = {"name": "python", "version": "3.99"}
    solution.cells[1].outputs = [v4.new_output("stream", text="left over")]
    assert as_text(build.exercise(solution)) == text


def test_equal_cells_get_different_ids():
    twice = v4.new_notebook(cells=[v4.new_markdown_cell("same"), v4.new_markdown_cell("same")])
    ids = [cell.id for cell in build.exercise(twice).cells]
    assert len(set(ids)) == 2 and ids[1] == f"{ids[0]}-2"


def test_making_leaves_the_solution_as_it_was(unit: Unit):
    solution = read(unit.solution)
    before = as_text(solution)
    build.exercise(solution)
    assert as_text(solution) == before


def test_a_change_in_the_solution_makes_the_exercise_stale_and_writing_mends_it(unit: Unit):
    assert all(derived.fresh for derived in build.exercises(unit.root))
    solution = read(unit.solution)
    solution.cells[2].source += "\n\nA new hint."
    miniature.save(solution, unit.solution)
    (derived,) = build.exercises(unit.root)
    assert not derived.fresh and not derived.worked_in
    assert build.write([derived]) == [unit.exercise]
    assert "A new hint." in unit.exercise.read_text()
    assert build.write(build.exercises(unit.root)) == []


def test_an_exercise_without_a_solution_is_stale_and_removed(unit: Unit):
    left = unit.exercise.with_name("07_gone.ipynb")
    left.write_text(unit.exercise.read_text())
    (stale,) = [derived for derived in build.exercises(unit.root) if not derived.fresh]
    assert stale.path == left
    assert build.write([stale]) == [left] and not left.exists()


def test_a_learners_work_is_never_overwritten(unit: Unit):
    work = read(unit.exercise)
    work.cells[3].source = "def square(x):\n    return x ** 2"
    miniature.save(work, unit.exercise)  # as Jupyter would: its own metadata
    text = unit.exercise.read_text()
    (derived,) = build.exercises(unit.root)
    assert derived.worked_in and not derived.fresh
    with pytest.raises(CourseError, match=r"somebody has worked in 00_squares\.ipynb: keep the work under another name"):
        build.write([derived])
    assert unit.exercise.read_text() == text
    build.write([derived], overwrite=True)
    assert "x ** 2" not in unit.exercise.read_text()


def test_running_an_exercise_is_not_working_in_it(unit: Unit):
    ran = read(unit.exercise)
    for cell in ran.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [v4.new_output("stream", text="ran")], 7
    unit.exercise.write_text(as_text(ran))
    assert not build.worked_in(unit.exercise)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda nb: nb.cells[3].update(source="### BEGIN SOLUTION\n1"), "no end solution"),
        (lambda nb: nb.cells[3].metadata.pop("nbgrader"), "Solution region detected in a non-solution cell"),
        (lambda nb: nb.cells[4].metadata["nbgrader"].pop("points"), "refuses"),
    ],
)
def test_a_solution_that_breaks_nbgraders_rules_is_named(unit: Unit, break_it, words):
    solution = read(unit.solution)
    break_it(solution)
    miniature.save(solution, unit.solution)
    with pytest.raises(CourseError, match=words) as caught:
        build.exercises(unit.root)
    assert str(caught.value).startswith(str(Path("solutions", "00_squares.ipynb")))


def test_pages_with_claims_are_brought_up_to_date(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("course.claimed.value", lambda name: 2.5)
    page = tmp_path / "page.md"
    page.write_text("It saves **0.1** <!--claim x:y .2f--> bits.\n")
    (derived,) = build.pages([page, tmp_path / "absent.md"])
    assert not derived.fresh
    build.write([derived])
    assert page.read_text() == "It saves **2.50** <!--claim x:y .2f--> bits.\n"
    page.write_text("A claim <!--claim x:y .2f--> without a number.\n")
    with pytest.raises(CourseError, match=r"page\.md: a claim comment must follow a number"):
        build.pages([page])


def test_saved_notebooks_are_tidied(unit: Unit):
    messy = read(unit.notebook)
    messy.metadata["jupytext"] = {"formats": "py"}
    messy.cells[1].metadata["execution"] = {"iopub.status.busy": "2030"}
    unit.notebook.write_text(as_text(messy))
    stale = [derived for derived in build.notebooks(unit.root) if not derived.fresh]
    assert [derived.path for derived in stale] == [unit.notebook]
    build.write(stale)
    assert as_text(tidy(messy)) == unit.notebook.read_text()
    assert read(unit.notebook).cells[2].outputs, "outputs stay"


@pytest.mark.parametrize("text, stays", [("  0%|          | 0/3 [00:00<?, ?it/s]", False), ("VBox(children=(IntSlider(value=6),))", True)])
def test_a_progress_bar_is_not_saved_and_a_slider_is(text: str, stays: bool):
    """A saved bar would stand at its beginning: what it became lives in the browser."""
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": text}
    printed = v4.new_output("stream", text="done\n")
    cell = v4.new_code_cell("", outputs=[v4.new_output("display_data", data=widget), printed])
    outputs = tidy(v4.new_notebook(cells=[cell])).cells[0].outputs
    assert len(outputs) == 1 + stays and outputs[-1] == printed


# judging


ANSWERS = {"square": "def square(x):\n    return x * x", "double": "def double(x):\n    return 2 * x"}


def hand_in(unit: Unit, **answers: str) -> Path:
    """The exercise with these answer cells, in a file of its own."""
    work = read(unit.exercise)
    for cell in work.cells:
        name = marks(cell).get("grade_id")
        if name in answers:
            cell.source = answers[name]
    return miniature.save(work, unit.root / "mine.ipynb")


def judge(unit: Unit, cell_seconds: float = 2, **answers: str) -> grading.Report:
    return grading.grade(hand_in(unit, **answers), unit, Limits(cell_seconds, total_seconds=60, memory_bytes=400_000_000))


def test_full_score_for_right_answers_and_none_for_the_stub(unit: Unit):
    right = judge(unit, **ANSWERS)
    assert (right.score, right.total, right.full, right.notes) == (3, 3, True, [])
    assert [outcome.exercise for outcome in right.outcomes] == ["1. Square", "2. Double"]
    stub = judge(unit)
    assert (stub.score, stub.full) == (0, False)
    assert [outcome.why for outcome in stub.outcomes] == ["nothing here yet"] * 2


def test_each_exercise_counts_by_itself_and_says_why(unit: Unit):
    report = judge(unit, square="def square(x):\n    return x + x", double=ANSWERS["double"])
    assert [outcome.why for outcome in report.outcomes] == ["expected 9, got 6", None]
    assert report.score == 2


@pytest.mark.parametrize(
    "answer, why",
    [
        ("def square(x:\n    return", "the answer's own cell failed: SyntaxError: "),
        ("1 / 0", "the answer's own cell failed: ZeroDivisionError: division by zero (line 1)"),
        ("def other(x):\n    return 9", "NameError: name 'square' is not defined. The cell that defines it is missing or stands below"),
        ("def square(x):\n    return x[0]", "TypeError: 'int' object is not subscriptable"),
        ("def square(x):\n    while True:\n        pass", "stopped after 2 s: is there an endless loop?"),
        ("while True:\n    pass", "the answer's own cell failed: stopped after 2 s: is there an endless loop?"),
        ("def square(x):\n    import os\n    os._exit(1)", "the kernel ended with exit status 1"),
        ("import ctypes\nctypes.string_at(0)", "the answer's own cell failed: the kernel was ended by SIGSEGV"),
        ("def square(x):\n    raise SystemExit", "SystemExit"),
    ],
)
def test_what_goes_wrong_costs_its_own_points_only(unit: Unit, answer, why):
    report = judge(unit, square=answer, double=ANSWERS["double"])
    first, second = report.outcomes
    assert first.why.startswith(why), first.why
    assert second.why is None and report.score == 2


def test_memory_without_end_is_stopped_before_the_machine_is(unit: Unit):
    bomb = "def square(x):\n    held = []\n    while True:\n        held.append(b'x' * 50_000_000)"
    report = judge(unit, cell_seconds=30, square=bomb, double=ANSWERS["double"])  # time enough on a busy machine
    assert report.outcomes[0].why.startswith("stopped: it used more than 0.4 GB of memory") and report.score == 2


def test_a_notebook_that_keeps_crashing_comes_to_an_end(unit: Unit, monkeypatch):
    monkeypatch.setattr(grading, "RESTARTS", 1)
    crash = "import os\nos._exit(1)"
    report = judge(unit, square=crash, double=crash)
    assert report.score == 0 and not report.full
    assert "exit status 1" in report.outcomes[0].why


def crash_first(cells):
    cells.insert(1, v4.new_code_cell("import os\nos._exit(1)"))


def test_a_cell_of_the_learners_own_that_crashes_is_left_out(unit: Unit):
    assert change(unit, crash_first).full


def test_what_was_not_reached_is_said(unit: Unit, monkeypatch):
    monkeypatch.setattr(grading, "RESTARTS", 0)
    words = "not run: the notebook ended before it, in another cell: the kernel ended with exit status 1"
    assert [outcome.why for outcome in change(unit, crash_first).outcomes] == [words] * 2


def test_the_time_for_the_whole_notebook(unit: Unit):
    work = hand_in(unit, square="import time\ntime.sleep(30)", double=ANSWERS["double"])
    report = grading.grade(work, unit, Limits(cell_seconds=None, total_seconds=3))
    assert report.seconds < 15 and report.score == 0
    words = "the time for the whole notebook, 3 s, was over"
    assert [outcome.why for outcome in report.outcomes] == [f"the answer's own cell failed: stopped: {words}", f"not run: {words}"]


def test_an_exercise_has_only_the_time_that_is_left(unit: Unit, monkeypatch):
    given = []

    def slow(witness, folder, cells, check, answer, at, judge, seeds, limits, before_cell):
        given.append((limits.total_seconds, limits.spent_seconds))
        return Hearing(passed=True, seconds=4.0)

    monkeypatch.setattr(grading.Witness, "hear", slow)
    report = grading.grade(unit.exercise, unit, Limits(total_seconds=10))
    assert given == [(10, 0), (10, 4)] and report.seconds == 8


def change(unit: Unit, edit) -> grading.Report:
    work = read(hand_in(unit, **ANSWERS))
    edit(work.cells)
    return grading.grade(miniature.save(work, unit.root / "mine.ipynb"), unit)


def test_changed_and_deleted_cells_are_put_back(unit: Unit):
    def cheat(cells):
        cells[1].source = "def check(answer, expected):\n    print('right')"  # the locked cell
        cells[3].source = "def square(x):\n    return 0"
        cells[4].source = "print('passed')"
        del cells[7]  # the check of double

    report = change(unit, cheat)
    assert [outcome.why for outcome in report.outcomes] == ["expected 9, got 0", None]
    assert report.notes == [
        "the cell 'setup' had been changed: the original was used",
        "the cell 'check-square' had been changed: the original was used",
        "the cell 'check-double' was missing: the original was put back",
    ]


def test_a_cell_put_back_does_not_shift_the_others(unit: Unit):
    def strip(cells):
        cells[7].source = "changed"  # the check of double
        del cells[4]  # the check of square
        del cells[1]  # the locked cell

    report = change(unit, strip)
    assert report.full
    assert [note.split("'")[1] for note in report.notes] == ["setup", "check-square", "check-double"]


def test_an_earlier_cell_that_failed_is_named(unit: Unit):
    def edit(cells):
        cells[3].source = "def square(x):\n    return helper(x)"
        cells.insert(3, v4.new_code_cell("import nowhere as helper"))

    report = change(unit, edit)
    words = "NameError: name 'helper' is not defined. An earlier cell failed: ModuleNotFoundError: No module named 'nowhere'"
    assert report.outcomes[0].why == words


def test_points_cannot_be_changed(unit: Unit):
    report = change(unit, lambda cells: cells[4].metadata["nbgrader"].update(points=100))
    assert report.total == 3


def test_a_missing_answer_cell_is_named(unit: Unit):
    report = change(unit, lambda cells: cells.pop(3))
    assert report.outcomes[0].why == "the answer cell 'square' is missing: copy it from a fresh exercise"
    assert report.notes == ["the answer cell 'square' is missing"]
    assert report.outcomes[1].why is None


def test_of_cells_that_are_there_twice_the_last_counts(unit: Unit):
    def copy(cells):
        old = from_dict(cells[3])
        old.source, old.id = "def square(x):\n    return 'first try'", "copied"
        cells.insert(3, old)

    report = change(unit, copy)
    assert report.full
    assert report.notes == ["the cell 'square' is there more than once: the last one counts"]


def test_the_learners_file_is_not_changed(unit: Unit):
    work = hand_in(unit, **ANSWERS)
    text = work.read_text()
    grading.grade(work, unit)
    assert work.read_text() == text


def test_another_notebook_no_notebook_and_no_exercise(unit: Unit, tmp_path: Path):
    other = miniature.save(miniature.notebook(), tmp_path / "other.ipynb")
    with pytest.raises(CourseError, match="none of the exercise's cells"):
        grading.grade(other, unit)
    with pytest.raises(CourseError, match="there is no file"):
        grading.grade(tmp_path / "absent.ipynb", unit)
    for text in ("not json", "[]", "{}", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', '{"worksheets": []}'):
        other.write_text(text)
        with pytest.raises(CourseError, match="is not a notebook"):
            grading.grade(other, unit)
    with pytest.raises(CourseError, match="unit 01 has no exercises"):
        grading.grade(other, find("cubes", unit.root))


def test_a_markdown_cell_that_once_was_code_and_odd_marks_are_no_obstacle(unit: Unit):
    work = json.loads(hand_in(unit, **ANSWERS).read_text())
    work["cells"][0] |= {"outputs": [], "execution_count": None}
    work["cells"][2]["metadata"]["nbgrader"] = "x"
    path = unit.root / "mine.ipynb"
    path.write_text(json.dumps(work))
    assert "outputs" not in read(path).cells[0]
    assert grading.grade(path, unit).full


# one exercise, another, and the judge


RIGHT_THEN = {
    "exit": "exit()",
    "quit": "quit()",
    "_exit": "import os\nos._exit(0)",
    "SystemExit": "raise SystemExit",
    "kills the process that starts it": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n1 / 0",
    "stops the process that starts it": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\n1 / 0",
    "a child in a session of its own": "import subprocess\nsubprocess.Popen(['sleep', '60'], start_new_session=True)\n1 / 0",
    "redefines the other's answer": "def double(x):\n    return 0\nexit()",
}


@pytest.mark.parametrize("end", RIGHT_THEN.values(), ids=RIGHT_THEN)
def test_an_answer_that_ends_the_program_costs_its_own_points_only(unit: Unit, end: str, monkeypatch):
    monkeypatch.setattr("course.hearing.WAIT_SECONDS", 2.0)
    report = judge(unit, square=f"{ANSWERS['square']}\n{end}", double=ANSWERS["double"])
    first, second = report.outcomes
    assert first.why and second.why is None, (first.why, second.why)


def test_an_exit_is_named(unit: Unit):
    report = judge(unit, square=f"{ANSWERS['square']}\nexit()", double=ANSWERS["double"])
    assert report.outcomes[0].why == "the answer's own cell failed: the notebook ended itself here: is there an exit() or a quit()?"


NOISE = {
    "rich": "import rich.traceback\nrich.traceback.install()",
    "much text": "print('x' * 3_000_000)",
    "no such magic": "%nosuchmagic",
    "excepthook": "import sys\nsys.excepthook = lambda *a: None",
    "showtraceback": "get_ipython().showtraceback = lambda *a, **k: None",
    "run_cell": "get_ipython().run_cell = lambda *a, **k: None",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "__del__": "class Last:\n    def __del__(self):\n        print('✓')\nlast = Last()",
    "print": "import builtins\nbuiltins.print = lambda *a, **k: None",
    "check": "class check:\n    square = double = staticmethod(lambda answer: print('right'))",
    "checks": "import course.checks.squares as c\nc.square = c.double = lambda answer: print('right')",
    "methods": "import course.checks.squares as c\nc.Check.__call__ = c.Check.verdict = lambda *a: None",
    "an attribute": "import course.checks.squares as c\nc.square.expected = c.double.expected = 12",
    "code": "import course.checks.squares as c\nc.Check.verdict.__code__ = (lambda self, plain, seed: None).__code__",
    "sys.modules": "import sys, types\nsys.modules['course.checks.squares'] = types.SimpleNamespace(square=print, double=print)",
    "SystemRandom": "import random\nrandom.SystemRandom = lambda: random.Random(0)",
    "json": "import json\njson.dumps = lambda *a, **k: '{}'",
    "builtins": "import builtins\nbuiltins.eval = builtins.getattr = lambda *a, **k: (lambda *b: 12)",
    "answers that equal everything": "class Nine(int):\n    __eq__ = lambda *a: True\n    __ne__ = lambda *a: False",
}  # fmt: skip
WRONG = {"square": "def square(x):\n    return globals().get('Nine', int)(12)", "double": "def double(x):\n    return 12"}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_nothing_that_a_notebook_replaces_makes_a_wrong_answer_right(unit: Unit, noise: str):
    work = read(hand_in(unit, square=f"{noise}\n{WRONG['square']}", double=WRONG["double"]))
    for number in range(2):
        assert grading.judge(work, unit.root, unit).score == 0
        if number == 0:
            work.cells.insert(0, v4.new_code_cell(noise))  # and in a cell of its own


def test_an_answer_may_use_an_earlier_one_and_runs_no_other(unit: Unit):
    report = judge(unit, **ANSWERS | {"double": "def double(x):\n    return int(square(x) ** 0.5) * 2"})
    assert report.full
    apart = {"square": "def square(x):\n    return x * x\n1 / 0", "double": "def double(x):\n    return 2 * x"}
    assert [bool(outcome.why) for outcome in judge(unit, **apart).outcomes] == [True, False]


def test_a_cell_that_tries_an_answer_is_run_with_that_one_only(unit: Unit, monkeypatch):
    ran = []
    hear = grading.Witness.hear
    monkeypatch.setattr(grading.Witness, "hear", lambda self, folder, cells, *rest: ran.append(cells) or hear(self, folder, cells, *rest))

    def tries(cells):
        cells.insert(4, v4.new_code_cell("tried = square(7)"))
        cells.insert(5, v4.new_code_cell("twice = tried + tried"))
        cells.insert(6, v4.new_code_cell("scale = 2"))

    assert change(unit, tries).full
    assert [[source.splitlines()[0] for _, source in cells] for cells in ran] == [
        ["from course.checks import squares as check", "def square(x):", "tried = square(7)", "twice = tried + tried", "scale = 2"],
        ["from course.checks import squares as check", "scale = 2", "def double(x):"],
    ]


LORA = find("lora")
REPLACES = {
    "torch.equal": "torch.equal = torch.allclose = lambda *a, **k: True",
    "methods": "torch.Tensor.equal = torch.Tensor.allclose = torch.Tensor.all = lambda *a, **k: True",
    "first_difference": "import course.checking\ncourse.checking.first_difference = lambda *a, **k: None",
    "the judge": "from course.checking import Check\nCheck._judge = Check.__call__ = Check._first = lambda *a, **k: None",
    "verdict": "from course.checking import Check\nCheck.verdict = Check._compare = lambda *a, **k: None",
    "the check": "import course.checks.lora as c\nc.merge = lambda answer: print('✓')",
    "observe": (
        "import course.checks.lora as c\n"
        "own = c.merge.observe\n"
        "object.__setattr__(c.merge, 'observe', lambda answer, seed: own(c.merge.reference, seed))"
    ),
    "its method": "import course.checks.lora as c\nrun = c.merge._run\nvars(c.merge)['_run'] = lambda a, s: run(c.merge.reference, s)",
    "observe's code": "import course.checks.lora as c\nc.merge.observe.__code__ = (lambda answer, seed: {}).__code__",
    "a built-in": "import course.checks.lora, sys\nvars(sys.modules['course.checks.lora.merge'])['str'] = lambda x: 'torch.bfloat16'",
}  # fmt: skip
UNMERGE = """

    @torch.no_grad()
    def unmerge(self):
        {}
        self.base.weight.sub_((self.scaling * (self.lora_B.float() @ self.lora_A.float())).to(self.base.weight.dtype))
        self.merged = False
"""


def hand_in_merge(replaces: str, inside: str) -> NotebookNode:
    """Unit 02 with one wrong answer, an unmerge() that subtracts: only torch.equal sees what is wrong with it."""
    work = build.exercise(read(LORA.solution))
    (worked,) = [cell.source for cell in read(LORA.solution).cells if marks(cell).get("grade_id") == "merge-answer"]
    (answer,) = [cell for cell in work.cells if marks(cell).get("grade_id") == "merge-answer"]
    answer.source = replaces + "\n" + worked.replace("def unmerge", "def as_it_should_be") + UNMERGE.format(inside)
    work.cells.insert(0, v4.new_code_cell("import torch\n" + replaces))
    return work


@pytest.mark.parametrize("replaces", REPLACES.values(), ids=REPLACES)
def test_nothing_that_the_judge_needs_can_be_replaced(replaces: str, tmp_path: Path):
    report = grading.judge(hand_in_merge(replaces, "pass"), tmp_path, LORA)
    assert report.score == 0
    assert "nothing here yet" not in report.outcomes[1].why


def test_an_answer_that_replaces_it_while_it_is_observed_is_found_out(tmp_path: Path):
    report = grading.judge(hand_in_merge("", "torch.equal = lambda *a: True"), tmp_path, LORA)
    assert report.outcomes[1].why == "your code replaces torch.equal, which the judge needs as it is"


# units by name


def test_units_are_found_by_number_and_by_topic(unit: Unit):
    assert [each.stem for each in units(unit.root)] == ["00_squares", "01_cubes"]
    for name in ("00", "0", "squares", "00_squares"):
        assert find(name, unit.root) == unit
    assert [each.number for each in select(["cubes", "0", "00"], unit.root)] == ["00", "01"]
    assert select(None, unit.root) == select([], unit.root) == units(unit.root)
    with pytest.raises(CourseError, match=r"there is no unit '7'\. Units: 00 \(squares\), 01 \(cubes\)"):
        find("7", unit.root)
    with pytest.raises(CourseError, match="none yet"):
        find("7", unit.root / "lessons")


# nbgrader


@pytest.fixture
def in_class(tmp_path: Path, monkeypatch):
    """nbgrader's commands, as a function of the unit, in a folder laid out by the course."""
    from nbgrader.apps import NbGraderAPI

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # nbgrader calls alembic by name

    def lay_out(root: Path) -> tuple[NbGraderAPI, Path]:
        folder = tmp_path / "classroom"
        folder.mkdir()
        monkeypatch.chdir(folder)  # nbgrader would read the configuration of the folder it is called in
        config = Config()
        classroom.configure(config, folder, root)
        classroom.lay_out(folder, root)
        return NbGraderAPI(config=config), folder

    return lay_out


def graded_by_nbgrader(in_class, unit: Unit, submissions: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """Student -> (score, most possible), through generate_assignment and autograde."""
    api, folder = in_class(unit.root)
    result = api.generate_assignment(unit.stem, force=True)
    assert result["success"], result.get("log", "") + result.get("error", "")
    released = read(folder / "release" / unit.stem / f"{unit.stem}.ipynb")
    ours = build.exercise(read(unit.solution))
    assert [(cell.cell_type, cell.source, marks(cell)) for cell in released.cells] == [
        (c.cell_type, c.source, marks(c)) for c in ours.cells
    ]
    scores = {}
    for student, path in submissions.items():
        work = folder / "submitted" / student / unit.stem / f"{unit.stem}.ipynb"
        work.parent.mkdir(parents=True)
        work.write_text(path.read_text())
        result = api.autograde(unit.stem, student, force=True)
        assert result["success"], result.get("log", "") + result.get("error", "")
        with api.gradebook as book:
            submission = book.find_submission(unit.stem, student)
            scores[student] = (submission.score, submission.max_score)
    export(folder)
    return scores


def export(folder: Path) -> None:
    from nbgrader.apps import ExportApp

    config = Config()
    config.CourseDirectory.root, config.CourseDirectory.course_id = str(folder), "peft-course"
    app = ExportApp(config=config)
    app.initialize([f"--CsvExportPlugin.to={folder / 'grades.csv'}"])
    app.start()
    assert len((folder / "grades.csv").read_text().splitlines()) > 1


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # from inside nbgrader
def test_nbgrader_gives_the_same_release_and_the_same_scores(unit: Unit, in_class, tmp_path: Path):
    partly = hand_in(unit, double=ANSWERS["double"]).rename(unit.root / "partly.ipynb")
    ends = hand_in(unit, square="import os\nos._exit(0)", double=ANSWERS["double"]).rename(unit.root / "ends.ipynb")
    submissions = {"ada": hand_in(unit, **ANSWERS), "bo": partly, "cy": unit.exercise, "di": ends}
    assert graded_by_nbgrader(in_class, unit, submissions) == {"ada": (3, 3), "bo": (2, 3), "cy": (0, 3), "di": (2, 3)}
    text = (tmp_path / "classroom" / "autograded" / "di" / unit.stem / f"{unit.stem}.ipynb").read_text()
    assert "is there an exit() or a quit()?" in text and "✓ right" in text
    assert os.access(tmp_path / "classroom" / "exchange", os.W_OK)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # from inside nbgrader
def test_nbgrader_grades_a_real_unit(in_class, tmp_path: Path):
    """The course's first unit with exercises: full score for the worked solution, none for the untouched exercise."""
    if not SOLVED:
        pytest.skip("no unit has exercises yet")
    unit = SOLVED[0]
    untouched = tmp_path / "untouched.ipynb"
    untouched.write_text(as_text(build.exercise(read(unit.solution))))
    scores = graded_by_nbgrader(in_class, unit, {"solved": unit.solution, "untouched": untouched})
    score, most = scores["solved"]
    assert score == most > 0
    assert scores["untouched"] == (0, most)


@pytest.mark.parametrize("program, laid_out", [("/usr/bin/nbgrader", True), ("/usr/bin/jupyter-lab", False)])
def test_the_courses_own_nbgrader_config_names_what_the_build_uses(monkeypatch, program, laid_out):
    config, asked = Config(), []
    monkeypatch.setattr(classroom, "lay_out", asked.append)
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back afterwards
    exec(compile((ROOT / "nbgrader_config.py").read_text(), "nbgrader_config.py", "exec"), {"get_config": lambda: config})
    assert asked == [ROOT / "classroom"] * laid_out
    assert config.ClearSolutions.code_stub == {"python": build.STUB}
    assert config.CourseDirectory.root == str(ROOT / "classroom")
    assert config.Exchange.root == str(ROOT / "classroom" / "exchange")
    assert config.Autograde.autograde_preprocessors[0] is classroom.Judge
