"""`course new` lays out a unit that builds, is judged, is tested and states its number before a word of it is replaced."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course import ROOT, new
from course.notebooks import read
from course.units import CourseError, Unit

STEM = "97_laid_out"
PARTS = [
    "lessons/97_laid_out.md",
    "slides/97_laid_out.md",
    "teaching/97_laid_out.md",
    "lessons/interview/97_laid_out.yaml",
    "notebooks/97_laid_out.ipynb",
    "solutions/97_laid_out.ipynb",
    "course/checks/laid_out/__init__.py",
    "course/checks/laid_out/first.py",
    "course/claims/laid_out.py",
    "reference/laid_out.py",
    "tests/test_laid_out.py",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the course with the new unit in it."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("course", "reference", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("lessons/interview", "notebooks", "solutions", "exercises"):
        (root / folder).mkdir(parents=True)
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, root / name)
    (root / "README.md").write_text("# A course\n")
    done = python(root, "-m", "course", "new", "97", "laid_out")
    assert done.returncode == 0, done.stderr
    assert [line.removeprefix("wrote ") for line in done.stdout.splitlines() if line.startswith("wrote ")] == PARTS
    return root


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_its_exercise_is_built_and_judged(checkout: Path):
    built = python(checkout, "-m", "course", "build")
    assert built.returncode == 0 and f"wrote exercises/{STEM}.ipynb" in built.stdout, built.stdout + built.stderr
    worked = python(checkout, "-m", "course", "check", "97", f"solutions/{STEM}.ipynb")
    assert worked.returncode == 0 and "2 of 2 points" in worked.stdout, worked.stdout + worked.stderr
    stub = python(checkout, "-m", "course", "check", "97")
    assert stub.returncode == 1 and "nothing here yet" in stub.stdout and "0 of 2 points" in stub.stdout


def test_its_checks_claims_and_module_pass_their_tests(checkout: Path):
    tests = ["tests/test_laid_out.py", "tests/test_checks.py", "tests/test_claims.py"]
    # the layout holds one exercise; a unit has three or more, and two tests say so
    done = python(checkout, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "laid_out and not belong and not nbgraders")
    assert done.returncode == 0, done.stdout
    for name in ("check", "format"):
        options = ["--check"] if name == "format" else []
        linted = python(checkout, "-m", "ruff", name, *options, *(part for part in PARTS if part.endswith((".py", ".ipynb"))))
        assert linted.returncode == 0, linted.stdout + linted.stderr


def test_its_notebook_runs(checkout: Path):
    done = python(checkout, "-m", "course", "run", "97", "--save")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4.667" in str(read(checkout / "notebooks" / f"{STEM}.ipynb"))


@pytest.mark.parametrize(
    "number, topic, words",
    [
        ("00", "cubic", "a unit 00_squares already"),
        ("07", "cubes", "a unit 01_cubes already"),
        ("x", "cubic", "NN must be a number"),
        ("123", "cubic", "NN must be a number"),
        ("07", "Paged-Optimizers", "the topic must be a Python name"),
    ],
)
def test_a_number_or_topic_that_is_taken_or_malformed_is_refused(small_course: Unit, number, topic, words):
    before = sorted(small_course.root.rglob("*"))
    with pytest.raises(CourseError, match=words):
        new.lay_out(number, topic, small_course.root)
    assert sorted(small_course.root.rglob("*")) == before


def test_nothing_is_overwritten(small_course: Unit):
    kept = small_course.root / "reference" / "cubic.py"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(CourseError, match=r"reference/cubic\.py would be overwritten"):
        new.lay_out("7", "cubic", small_course.root)
    assert kept.read_text() == "mine" and not (small_course.root / "lessons" / "07_cubic.md").exists()
