"""A class of thirty is judged side by side: what hangs, crashes, fills memory, prints without end or cheats costs nobody else anything."""

import csv
import importlib
import io
import os
import sys
import time
import types
from pathlib import Path

import miniature
import psutil
import pytest
from nbformat import v4
from rich.console import Console

from course import ROOT, build, classroom, cli, grading, marking, siblings, witness
from course.notebooks import as_text, marks, read
from course.running import Limits
from course.units import CourseError, Unit, find, units

LIMITS = Limits(cell_seconds=3, total_seconds=60, memory_bytes=800_000_000)
RIGHT = {"square": "def square(x):\n    return x * x", "double": "def double(x):\n    return 2 * x"}


@pytest.fixture
def unit(small_course: Unit) -> Unit:
    build.write(build.exercises(small_course.root))
    return small_course


def filled(unit: Unit, above: str = "", **answers: str) -> str:
    """The unit's exercise with these answers, and a cell of the learner's own on top."""
    notebook = build.exercise(read(unit.solution))
    for cell in notebook.cells:
        if (name := marks(cell).get("grade_id")) in answers:
            cell.source = answers[name]
    if above:
        notebook.cells.insert(0, v4.new_code_cell(above))
    return as_text(notebook)


ZERO = "def square(x):\n    return 0"
STUBBORN = """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""
OTHERS = "import glob\nothers = glob.glob('*') + glob.glob('../../*.ipynb')\ndef square(x):\n    return 9 * bool(others)"
TO_THE_JUDGE = "import os, signal, psutil\npsutil.Process(os.getppid()).parent().kill()\nwhile True:\n    pass"
BAD = {  # a cell, or the first answer -> what the second answer still earns
    "hangs": ({"square": "while True:\n    pass"}, 2),
    "hangs, and ignores the interrupt": ({"square": STUBBORN}, 2),
    "crashes": ({"square": "import ctypes\nctypes.string_at(0)"}, 2),
    "exits": ({"square": "import os\nos._exit(0)"}, 2),
    "fills memory": ({"square": "held = []\nwhile True:\n    held.append(b'x' * 50_000_000)"}, 2),
    "prints 100 MB": ({"square": "print('x' * 100_000_000)\nimport os\nos.write(1, b'x' * 100_000_000)\n" + ZERO}, 2),
    "writes without end": (
        {"square": "with open('large', 'wb') as file:\n    while True:\n        file.write(b'x' * 10_000_000)"},
        2,
    ),
    "leaves a process": ({"square": "import subprocess\nsubprocess.Popen(['sleep', '307'], start_new_session=True)\n1 / 0"}, 2),
    "is no Python": ({"square": "def square(x:"}, 2),
    "replaces the judge": (
        {"above": "import course.checks.squares as c\nc.Check.verdict = c.Check.witness = lambda *a: 9", "square": ZERO},
        2,
    ),
    "replaces the check": ({"above": "class check:\n    square = print", "square": ZERO}, 2),
    "patches torch": ({"above": "import torch\ntorch.equal = torch.allclose = lambda *a: True", "square": ZERO}, 2),
    "looks at the others": ({"square": OTHERS}, 2),
}  # fmt: skip
LOST = {  # file -> why it is not gradable
    "of another unit": "none of the exercise's cells",
    "no json": "is not a notebook",
    "empty": "is not a notebook",
    "ends the judge": "ended from outside",
}


@pytest.fixture
def thirty(unit: Unit, tmp_path: Path) -> tuple[Path, dict[str, float | None]]:
    """A folder as nbgrader collects it, and the score that each student should get; None: it can't be judged."""
    folder, expected = tmp_path / "submitted", {}

    def hand_in(student: str, text: str, score: float | None) -> None:
        path = folder / student / unit.stem / f"{unit.stem}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        expected[student] = score

    for name, (cells, score) in BAD.items():
        hand_in(name, filled(unit, **{"double": RIGHT["double"]} | cells), score)
    for name in LOST:
        text = {"of another unit": as_text(miniature.notebook()), "no json": "{", "empty": ""}.get(name)
        hand_in(name, text if text is not None else filled(unit, square=TO_THE_JUDGE), None)
    hand_in("untouched", filled(unit), 0)
    while len(expected) < 30:
        hand_in(f"student {len(expected)}", filled(unit, **RIGHT), 3)
    return folder, expected


def test_thirty_students_of_whom_half_do_harm(unit: Unit, thirty):
    folder, expected = thirty
    mine = set(psutil.Process().children())
    found = marking.mark_all(marking.submissions(folder, None, unit.root), LIMITS, processes=4)
    assert {mark.student: mark.score for mark in found} == expected
    assert [mark.student for mark in found] == sorted(expected)
    for mark in found:
        assert LOST.get(mark.student, "") in mark.why
        assert mark.total == (3 if mark.gradable else None)
    assert set(psutil.Process().children()) == mine, "nothing is left running"
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert [line for line in running if line == ["sleep", "307"] or str(unit.checks.parent) in line] == []


# what lies beside a notebook

EVIL = "import builtins, sys\nsys.modules['course.checking'] = None\nbuiltins.all = lambda *a: True\nraise SystemExit(0)\n"
IN_THE_WAY = (
    "course.py", "reference/__init__.py", "torch.py", "torch/__init__.py", "torch/cuda.py", "json.py", "Random.py", "numpy.pth",
    "sitecustomize.py", "usercustomize.py", "conftest.py", "typing_extensions.py", "nbformat.py", "fractions.py", "ipython_config.py",
)  # fmt: skip
USES = "import helper, tools.twice\ndef square(x):\n    return helper.square(x) + len(open('data/empty.txt').read())"


def beside(path: Path, name: str, content: str | bytes) -> None:
    path = path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def with_help(unit: Unit, folder: Path, student: str = "ada") -> Path:
    """The folder of a student whose answers use modules and data of her own."""
    path = folder / student / unit.stem
    beside(path, f"{unit.stem}.ipynb", filled(unit, square=USES, double="def double(x):\n    return tools.twice.of(x)"))
    beside(path, "helper.py", "def square(x):\n    return x * x\n")
    beside(path, "tools/twice.py", "def of(x):\n    return 2 * x\n")
    beside(path, "data/empty.txt", "")
    return path


def marked(unit: Unit, folder: Path) -> dict[str, marking.Mark]:
    return {mark.student: mark for mark in marking.mark_all(marking.submissions(folder, None, unit.root), LIMITS)}


def test_a_learner_s_own_files_come_along_and_are_named(unit: Unit, tmp_path: Path):
    path = with_help(unit, tmp_path / "in")
    for name in ("timestamp.txt", ".hidden", "__pycache__/helper.cpython-311.pyc"):
        beside(path, name, "")
    mark = marked(unit, tmp_path / "in")["ada"]
    assert (mark.score, mark.notes) == (3, ["brought along: data/empty.txt, helper.py, tools/twice.py"])


def test_a_file_in_the_place_of_a_module_stays_behind(unit: Unit, tmp_path: Path):
    path = with_help(unit, tmp_path / "in")
    cheat = tmp_path / "in" / "bo" / unit.stem
    beside(cheat, f"{unit.stem}.ipynb", filled(unit, above="import torch, course, json, random, fractions", **{"square": ZERO}))
    for folder in (path, cheat):
        for name in IN_THE_WAY:
            beside(folder, name, EVIL)
        beside(folder, "helper2.so", EVIL)
    marks_ = marked(unit, tmp_path / "in")
    assert (marks_["ada"].score, marks_["bo"].score) == (3, 0)
    for mark in marks_.values():
        (left,) = [note for note in mark.notes if note.startswith("left behind")]
        assert "course.py (Python would find it in the place of course)" in left and "conftest.py" in left and "more" in left
    scratch = tmp_path / "scratch"
    siblings.bring(cheat / f"{unit.stem}.ipynb", set(), scratch)
    assert not scratch.exists(), "nothing of it was copied"
    assert siblings.in_the_way(cheat) and "hides a module" in " ".join(grading.grade(path / f"{unit.stem}.ipynb", unit, LIMITS).notes)


def test_no_link_leads_out_and_sizes_are_limited(unit: Unit, tmp_path: Path, monkeypatch):
    path, secret = with_help(unit, tmp_path / "in"), tmp_path / "secret"
    secret.mkdir()
    (secret / "grades.txt").write_text("secret")
    (path / "grades.txt").symlink_to(secret / "grades.txt")
    (path / "all").symlink_to(secret)
    os.mkfifo(path / "waits")
    beside(path, "large.bin", b"x" * 2000)
    monkeypatch.setattr(siblings, "LARGEST_BYTES", 1000)
    scratch = tmp_path / "scratch"
    came, left = siblings.bring(path / f"{unit.stem}.ipynb", set(), scratch)
    assert came == "brought along: data/empty.txt, helper.py, tools/twice.py"
    for name in ("all (not a file)", "grades.txt (not a file)", "waits (not a file)", "large.bin (more than 0 MB in all)"):
        assert name in left
    monkeypatch.setattr(siblings, "MOST_FILES", 1)
    assert siblings.bring(path / f"{unit.stem}.ipynb", {"data"}, scratch)[0] == "brought along: helper.py"


def test_nothing_comes_from_a_folder_that_several_share(unit: Unit, tmp_path: Path):
    folder = tmp_path / "in"
    for name in ("ada.ipynb", "bo.ipynb", "class/cy.ipynb", "class/di.ipynb", "eve/00_squares.ipynb", "eve/01_cubes/mine.txt", "eve/a.txt"):
        beside(folder, name, filled(unit, square=USES) if name.endswith("ipynb") else "")
    beside(folder, "helper.py", "def square(x):\n    return x * x\n")
    found = marking.submissions(folder, unit, unit.root)
    assert [each.notebook.stem for each in found if each.own_folder] == ["00_squares"]
    (eve,) = [mark for mark in marking.mark_all(found, LIMITS) if mark.student == "eve"]
    assert eve.notes == ["brought along: a.txt"]


def test_the_score_is_that_of_course_check(unit: Unit, tmp_path: Path):
    for student, answers in {"ada": RIGHT, "bo": RIGHT | {"square": "def square(x):\n    return x + x"}}.items():
        path = tmp_path / "in" / f"{student}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(filled(unit, **answers))
    for mark in marking.mark_all(marking.submissions(tmp_path / "in", unit, unit.root), LIMITS):
        report = grading.grade(mark.notebook, unit, LIMITS)
        assert (mark.score, mark.total) == (report.score, report.total)
        assert mark.wrong == [f"{outcome.exercise}: {outcome.why}" for outcome in report.outcomes if outcome.why]


def test_a_judge_that_does_not_end_is_ended(unit: Unit, tmp_path: Path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ada.ipynb").write_text(filled(unit, **RIGHT))
    monkeypatch.setattr(marking, "SLACK_SECONDS", 0.0)
    monkeypatch.setattr(grading, "judge", lambda *rest: time.sleep(60))
    (mark,) = marking.mark_all(marking.submissions(tmp_path / "in", unit, unit.root), Limits(total_seconds=0.5))
    assert not mark.gradable and mark.why == "judging it took too long" and mark.seconds < 10


def test_where_notebooks_are_found(unit: Unit, tmp_path: Path):
    places = ("ada/00_squares/00_squares.ipynb", "bo/00_squares.ipynb", "cy/00_squares/mine.ipynb", "di.ipynb")
    for place in (*places, "ada/00_squares/.ipynb_checkpoints/00_squares-checkpoint.ipynb"):
        path = tmp_path / "in" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
    found = marking.submissions(tmp_path / "in", None, unit.root)
    assert [(each.student, each.unit and each.unit.stem) for each in found] == [
        ("ada", "00_squares"), ("bo", "00_squares"), ("cy", "00_squares"), ("di", None)
    ]  # fmt: skip
    assert len(marking.submissions(tmp_path / "in", unit, unit.root)) == 4
    (last,) = [mark for mark in marking.mark_all(found, LIMITS) if mark.student == "di"]
    assert "neither its name nor its folder says which unit" in last.why
    for folder in (tmp_path / "nowhere", tmp_path / "in" / "ada" / "00_squares" / ".ipynb_checkpoints"):
        with pytest.raises(CourseError, match="there is no"):
            marking.submissions(folder / "x", None, unit.root)


def test_the_list_keeps_not_gradable_apart_from_zero_and_starts_no_formula(tmp_path: Path):
    found = [
        marking.Mark("=cmd()", "00_squares", tmp_path / "a.ipynb", 0.0, 3.0, wrong=["1. Square: -1, not 9", "2. Double: no"]),
        marking.Mark("bo", "00_squares", tmp_path / "b.ipynb", why="is not a notebook"),
    ]
    rows = list(csv.DictReader(io.StringIO(marking.as_csv(found, tmp_path))))
    assert [(row["student"], row["score"], row["of"], row["state"]) for row in rows] == [
        ("'=cmd()", "0", "3", "graded"),
        ("bo", "", "", "not gradable"),
    ]
    assert rows[0]["why"] == "1. Square: -1, not 9 | 2. Double: no"


def test_the_command(unit: Unit, tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "ada.ipynb").write_text(filled(unit, **RIGHT))
    monkeypatch.setattr(cli.shared, "ROOT", unit.root)
    monkeypatch.setattr(cli.shared, "console", Console(width=160, highlight=False))
    table = tmp_path / "out.csv"

    def course(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["course", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().out

    status, printed = course("grade", folder, "--unit", "0", "--csv", table)
    assert status == 0 and "1 of 1  ada  00_squares  3 of 3" in printed and ",3,3,graded," in table.read_text()
    (folder / "bo.ipynb").write_text("{")
    status, printed = course("grade", folder, "--unit", "0")
    assert status == 1 and "not gradable" in printed and "1 of 2 could not be graded: they have no score." in printed


# worked answers are not to be had, on the course's own units

CHEATS = {
    "is the judge's": ("merge-answer", "from course.checks import lora\nMergeable = lora.merge.reference"),
    "calls the judge's": ("count-answer", "def lora_parameters(*a):\n    return check.parameter_count.second(*a)"),
    "inherits the module's": ("forward-answer", "class LoRALinear(ReferenceLoRA):\n    pass"),
    "is a partial of it": ("conv-answer", "import functools\nconv_delta = functools.partial(check.conv_delta.reference)"),
    "reads the solution": (
        "repair-answer",
        f"import json\nfor cell in json.load(open({str(find('lora').solution)!r}))['cells']:\n    exec(''.join(cell['source']))",
    ),
    "reads the judge": ("inject-answer", "import inspect\nexec(open(inspect.getfile(check.inject.reference)).read())\ninject = reference"),
}
HIDDEN = {
    "turns the look-out off": (
        "count-answer",
        "import sys\ndef lora_parameters(*a):\n    sys.setprofile(None)\n    return check.parameter_count.reference(*a)",
    ),
    "in a thread": (
        "conv-answer",
        "import threading\ndef conv_delta(*a):\n    out = []\n"
        "    thread = threading.Thread(target=lambda: out.append(check.conv_delta.reference(*a)))\n"
        "    thread.start()\n    thread.join()\n    return out[0]",
    ),
    "asks another program": ("inject-answer", f"import subprocess\nsubprocess.check_output(['cat', {str(find('lora').solution)!r}])"),
}  # fmt: skip


@pytest.mark.parametrize("cheats", [CHEATS, HIDDEN], ids=["plainly", "hidden"])
def test_worked_answers_earn_nothing(cheats: dict, tmp_path: Path):
    lora = find("lora")
    notebook = build.exercise(read(lora.solution))
    sources = dict(cheats.values())
    for cell in notebook.cells:
        cell.source = sources.get(marks(cell).get("grade_id"), cell.source)
    report = grading.judge(notebook, tmp_path, lora)
    said = {outcome.grade_id.replace("-check", "-answer"): outcome.why for outcome in report.outcomes}
    for name in sources:
        assert "runs the worked one: write it yourself" in said[name] or "worked answers can't be read" in said[name], (name, said[name])
    assert report.score == 0


def test_worked_answers_earn_nothing_through_a_module_beside_the_notebook_either(tmp_path: Path):
    lora = find("lora")
    path, notebook = tmp_path / "in" / "ada" / lora.stem, build.exercise(read(lora.solution))
    solution = str(lora.solution)
    beside(path, "helper.py", "from course.checks import lora\n\n\nclass Own(lora.merge.reference):\n    pass\n")
    beside(path, "reader.py", f"def inject(*a, **k):\n    exec(open({solution!r}).read())\n")
    beside(path, "course/checks/lora.py", EVIL)
    beside(path, "reference/lora.py", EVIL)
    sources = {"merge-answer": "from helper import Own as Mergeable", "inject-answer": "from reader import inject as inject"}
    for cell in notebook.cells:
        cell.source = sources.get(marks(cell).get("grade_id"), cell.source)
    beside(path, f"{lora.stem}.ipynb", as_text(notebook))
    (mark,) = marking.mark_all(marking.submissions(tmp_path / "in"), grading.LIMITS)
    assert mark.score == 0 and mark.notes[0] == "brought along: helper.py, reader.py" and "course/checks/lora.py" in mark.notes[1]
    assert "runs the worked one" in " ".join(mark.wrong) and "can't be read" in " ".join(mark.wrong)


# nbgrader's classroom


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # from inside nbgrader
@pytest.mark.parametrize("topic, check", [("lora", "forward"), ("lora", "merge"), ("qlora", "product"), ("peft_family", "fusion")])
def test_only_the_course_s_own_code_is_a_worked_answer(topic: str, check: str):
    """Its environment may lie within the course's folder, and every answer runs torch."""
    watched = witness.Worked(getattr(importlib.import_module(f"course.checks.{topic}"), check))
    assert watched.code
    own = (ROOT / "course", ROOT / "reference")
    assert [file for file, _ in watched.code if not any(Path(file).is_relative_to(folder) for folder in own)] == []


def test_a_copy_of_the_worked_code_under_another_name_is_seen():
    check = importlib.import_module("course.checks.capstone").diagnose
    code = check.reference.__code__.replace(co_name="mine")
    copy = types.FunctionType(code, check.reference.__globals__, "mine")
    copy.__kwdefaults__ = check.reference.__kwdefaults__
    watched = witness.Worked(check)
    watched.observed(check.observe, lambda *given: copy(*given), 1)
    assert watched.ran
    watched.observed(check.observe, lambda measured, tolerance: {"do": "ship"}, 1)
    assert not watched.ran


def test_a_classroom_begins_and_beginning_again_changes_nothing(unit: Unit, tmp_path: Path):
    from nbgrader.api import Gradebook

    roll = tmp_path / "roll.csv"
    roll.write_text("id,first_name\nada,Ada\nbo,\nada,Ada\n")
    folder = tmp_path / "classroom"
    for _ in range(2):
        said = classroom.begin(folder, unit.root, roll)
        assert said[0].startswith("1 assignments and 2 students") and "nbgrader release_assignment 00_squares" in said[2]
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as book:
        assert {student.id: student.first_name for student in book.students} == {"ada": "Ada", "bo": None}
        assert [assignment.name for assignment in book.assignments] == ["00_squares"]
    assert (folder / "source" / unit.stem / f"{unit.stem}.ipynb").exists() and os.access(folder / "exchange", os.W_OK)
    roll.write_text("name\nada\n")
    with pytest.raises(CourseError, match="has no column id"):
        classroom.begin(folder, unit.root, roll)
    with pytest.raises(CourseError, match="there is no file"):
        classroom.begin(folder, unit.root, tmp_path / "none.csv")


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # from inside nbgrader
def test_an_assignment_goes_out_and_comes_back_through_the_exchange(unit: Unit, tmp_path: Path, monkeypatch):
    from nbgrader.apps import NbGraderAPI
    from nbgrader.auth import Authenticator
    from nbgrader.coursedir import CourseDirectory
    from nbgrader.exchange import ExchangeFactory
    from traitlets.config import Config

    teacher, learner = tmp_path / "classroom", tmp_path / "learner"
    classroom.begin(teacher, unit.root)
    learner.mkdir()
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    config = Config()
    classroom.configure(config, teacher, unit.root)
    monkeypatch.chdir(teacher)
    class_ = NbGraderAPI(config=config)
    for step in (class_.generate_assignment, class_.release_assignment):
        assert (done := step(unit.stem))["success"], done.get("log")
    theirs = Config()
    classroom.configure(theirs, teacher, unit.root)
    theirs.CourseDirectory.assignment_id = unit.stem
    monkeypatch.chdir(learner)  # where a learner's copies are put, and handed in from
    course = {"coursedir": CourseDirectory(config=theirs), "authenticator": Authenticator(config=theirs), "config": theirs}
    ExchangeFactory(config=theirs).FetchAssignment(**course).start()
    (learner / unit.stem / f"{unit.stem}.ipynb").write_text(filled(unit, **RIGHT))
    ExchangeFactory(config=theirs).Submit(**course).start()
    monkeypatch.chdir(teacher)
    assert (done := class_.collect(unit.stem))["success"], done.get("log")
    found = marking.mark_all(marking.submissions(teacher / "submitted", None, unit.root), LIMITS)
    assert [(mark.unit, mark.score) for mark in found] == [(unit.stem, 3.0)]


@pytest.mark.skipif("COURSE_LARGE_CLASS" not in os.environ, reason="minutes long: set COURSE_LARGE_CLASS=1")
def test_thirty_students_of_every_unit(tmp_path: Path):
    """Worked solutions and untouched exercises of the whole course: full score and none, thirty of each unit."""
    for number in range(30):
        for unit in (each for each in units() if each.solution.exists()):
            path = tmp_path / f"student{number:02}" / unit.stem / f"{unit.stem}.ipynb"
            path.parent.mkdir(parents=True)
            path.write_text(unit.solution.read_text() if number % 2 else as_text(build.exercise(read(unit.solution))))
    for mark in marking.mark_all(marking.submissions(tmp_path), grading.LIMITS, processes=2):
        assert mark.score == (mark.total if int(mark.student[-2:]) % 2 else 0), mark
