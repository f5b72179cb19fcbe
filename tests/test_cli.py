"""The `course` command: what it says, what it exits with, and that mistakes end in a sentence."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
from rich.console import Console

from course import ROOT, build, cli, doctor
from course.lab import recorded
from course.notebooks import marks, read
from course.units import Unit


@pytest.fixture
def course(small_course: Unit, monkeypatch, capsys):
    """Run the command on the small course; returns (exit status, what it printed)."""
    root = small_course.root
    monkeypatch.setattr(cli.shared, "ROOT", root)
    monkeypatch.setattr("course.claimed.pages", lambda: [root / "README.md"])
    monkeypatch.chdir(root)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["course", *words])
        monkeypatch.setattr(cli.shared, "console", Console(width=160, highlight=False))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    run.unit = small_course
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "benchmarks"}
    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]  # `course bench` puts the small course's in their place
    sys.modules.update(before)


def test_help_is_there_for_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nimport course.cli\n"
        "heavy = {'torch', 'transformers', 'nbclient', 'nbconvert', 'nbgrader', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_the_commands(course):
    status, printed = course("--help")
    assert status == 0
    for command in ("run", "check", "build", "new", "figures", "site", "doctor", "demo", "train-tiny", "bench"):
        assert f" {command} " in printed
        assert course(command, "--help")[0] == 0


@pytest.mark.parametrize(
    "words",
    [("check", "7"), ("run", "7"), ("run", "00", "seven"), ("bench", "7")],
)
def test_a_name_that_does_not_exist_lists_those_that_do(course, words):
    status, printed = course(*words)
    assert status == 2 and "Traceback" not in printed
    assert "there is no" in printed and ("00 (squares), 01 (cubes)" in printed or "There are: none yet" in printed)


def test_run_makes_pages_and_a_table_and_leaves_the_notebook(course):
    before = course.unit.notebook.read_text()
    status, printed = course("run")
    assert status == 0
    assert "00_squares: passed" in printed
    for words in ("notebook", "seconds", "peak memory", "result", "GB", "Pages: site/index.html"):
        assert words in printed
    page = course.unit.root / "site" / "notebooks" / "00_squares.html"
    assert "drawn" in page.read_text()
    assert "passed" in (course.unit.root / "site" / "index.html").read_text()
    assert course.unit.notebook.read_text() == before


def test_run_says_which_cell_failed_and_saves_only_what_passed(course):
    notebook = read(course.unit.notebook)
    notebook.cells[1].source = "a = 1\nb = a / 0\nc = 2"
    miniature.save(notebook, course.unit.notebook)
    before = course.unit.notebook.read_text()
    status, printed = course("run", "0", "--save")
    assert status == 1
    assert "failed in cell 2" in printed and "ZeroDivisionError: division by zero" in printed and "b = a / 0" in printed
    assert course.unit.notebook.read_text() == before


def test_a_notebook_that_cannot_be_read_costs_no_other_page(course):
    course.unit.notebook.write_text("{")
    for command in ("run", "site"):
        status, printed = course(command)
        assert status == 2 and "00_squares.ipynb is not a notebook" in printed and "Traceback" not in printed
        assert "Cubes" in (course.unit.root / "site" / "lessons" / "01_cubes.html").read_text()


def test_ctrl_c_says_what_is_kept(course, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("course.running.execute", interrupted)
    status, printed = course("run")
    assert status == 130 and "0 of 1 notebooks had run; their pages are written." in printed and "stopped" in printed
    assert (course.unit.root / "site" / "index.html").exists()


def test_ctrl_c_anywhere_else_says_so(course, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("course.website.write", interrupted)
    status, printed = course("site")
    assert status == 130 and "stopped" in printed.lower()


def test_run_saves_when_asked(course):
    status, _ = course("run", "squares", "--save")
    saved = read(course.unit.notebook)
    assert status == 0 and saved.cells[1].execution_count == 1 and "execution" not in saved.cells[1].metadata
    assert saved.cells[2].outputs[0].text == "drawn\n"


def test_what_is_saved_does_not_depend_on_whose_answers_are_on_the_machine(course, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    notebook = read(course.unit.notebook)
    notebook.cells[1].source = "import os\nfrom pathlib import Path\nprint(list(Path(os.environ['COURSE_DATA']).iterdir()))"
    miniature.save(notebook, course.unit.notebook)
    (tmp_path / "reviews.jsonl").write_text("{}")
    assert course("run", "squares", "--save")[0] == 0
    assert read(course.unit.notebook).cells[1].outputs[0].text == "[]\n"
    assert os.environ["COURSE_DATA"] == str(tmp_path)


def test_a_slow_or_large_notebook_is_pointed_out(course, monkeypatch):
    monkeypatch.setattr(cli.learn, "SECONDS", 0)
    monkeypatch.setattr(cli.learn, "BYTES", 1e6)
    status, printed = course("run")
    assert status == 0 and "passed, but over 0 s and over 0 GB" in printed


def test_run_with_nothing_to_run(course):
    assert course("run", "01") == (2, "course: there is no notebook to run\n")


def test_check_prints_the_score_and_why(course):
    build.write(build.exercises(course.unit.root))
    status, printed = course("check", "squares")
    assert status == 1
    assert "0 of 3 points" in printed and printed.count("nothing here yet") == 2 and "1. Square" in printed
    status, printed = course("check", "0", str(course.unit.solution))
    assert status == 0 and "3 of 3 points" in printed and printed.count("right") == 2


def test_check_stops_at_its_limits(course):
    build.write(build.exercises(course.unit.root))
    work = read(course.unit.exercise)
    for cell in work.cells:
        if marks(cell).get("grade_id") == "square":
            cell.source = "def square(x):\n    while True: pass"
    path = miniature.save(work, course.unit.root / "mine.ipynb")
    status, printed = course("check", "0", str(path), "--cell-seconds", "1")
    assert status == 1 and "stopped after 1 s: is there an endless loop?" in printed


def test_check_without_a_notebook_says_so(course):
    status, printed = course("check", "0", "nowhere.ipynb")
    assert status == 2 and "there is no file nowhere.ipynb" in printed


def test_build_writes_and_checks(course):
    assert not course.unit.exercise.exists()
    status, printed = course("build", "--check")
    assert status == 2 and "exercises/00_squares.ipynb is out of date" in printed and "run `course build`" in printed
    assert not course.unit.exercise.exists()
    status, printed = course("build")
    assert status == 0 and "wrote exercises/00_squares.ipynb" in printed
    assert course("build", "--check")[0] == 0


def test_site_makes_pages_without_running(course):
    status, printed = course("site")
    assert status == 0 and "Pages: site/index.html" in printed
    assert (course.unit.root / "site" / "lessons" / "01_cubes.html").exists()


def test_bench_lists_and_runs(course):
    folder = course.unit.root / "benchmarks"
    folder.mkdir()
    (folder / "counting.py").write_text('"""How fast one counts.\n\nMore."""\n\n\ndef main():\n    print("counted")\n')
    assert course("bench") == (0, "counting  How fast one counts.\n")
    assert course("bench", "counting") == (0, "counted\n")
    status, printed = course("bench", "other")
    assert status == 2 and "there is no measurement 'other'. There are: counting" in printed


def test_bench_runs_what_has_a_main_and_imports_it_from_its_own_checkout(course):
    folder, before = course.unit.root / "benchmarks", list(sys.path)
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Measurements."""\n')
    (folder / "shared.py").write_text('WORD = "shared"\n')
    (folder / "using.py").write_text('"""Uses it."""\n\nfrom benchmarks.shared import WORD\n\n\ndef main():\n    print(WORD)\n')
    assert course("bench") == (0, "using  Uses it.\n")
    assert course("bench", "using") == (0, "shared\n")
    assert sys.path == before and course("bench", "shared")[0] == 2


def test_bench_passes_on_what_follows_the_name(course, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["course", "bench", "told", "--smoke", "--only", "a"])  # and puts it back afterwards
    folder = course.unit.root / "benchmarks"
    folder.mkdir()
    (folder / "told.py").write_text(
        "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser()\n    parser.add_argument('--only')\n"
        "    parser.add_argument('--smoke', action='store_true')\n    print(parser.parse_args())\n"
    )
    assert course("bench", "told", "--smoke", "--only", "a") == (0, "Namespace(only='a', smoke=True)\n")
    assert course("bench", "told") == (0, "Namespace(only=None, smoke=False)\n")


def record(root: Path, name: str, device: str, **rows: float) -> None:
    path = root / "benchmarks" / "recorded" / device / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"name": name, "device": f"Card {device}", "day": "2026-01-01", "versions": {"torch": "2.9"}}
    path.write_text(json.dumps(entry | {"result": {"rows": [{"work": work, "ours": ms, "floor": 1.0} for work, ms in rows.items()]}}))


COUNTING = '''"""How fast one counts."""


def table(result):
    return "counted: [" + ", ".join(row["work"] for row in result["rows"]) + "]" + 90 * "-"


def main():
    raise RuntimeError("measured")
'''


def test_bench_shows_recorded_tables_and_cards_side_by_side(course):
    root = course.unit.root
    record(root, "speed", "a", up=2.0, down=4.0)
    record(root, "speed", "b", up=1.0)
    record(root, "speed_far", "a", far=3.0)
    (root / "benchmarks" / "speed.py").write_text(COUNTING)
    assert "How fast one counts. Records speed_far." in course("bench")[1]
    status, printed = course("bench", "speed", "--recorded")
    first, second, beside, _legend, _ = (part.splitlines() for part in printed.split("\n\n"))
    assert status == 0 and first == ["speed on Card a", "Recorded 2026-01-01: torch 2.9", "counted: [up, down]" + 90 * "-"]
    assert second[0] == "speed on Card b" and [line.split() for line in beside[1:]] == [["up", "2.00", "·", "50%", "1.00", "·", "100%"]]


def test_bench_shows_one_recorded_result_by_its_own_name(course):
    root = course.unit.root
    record(root, "speed_far", "a", far=3.0)
    (root / "benchmarks" / "speed.py").write_text(COUNTING)
    status, printed = course("bench", "speed_far", "--recorded")
    assert status == 0 and printed.startswith("speed_far on Card a\n") and "counted: [far]" in printed
    status, printed = course("bench", "other", "--recorded")
    assert status == 2 and "there is no recorded result 'other'. There are: speed_far" in printed
    (root / "benchmarks" / "new.py").write_text(COUNTING)
    status, printed = course("bench", "new", "--recorded")
    assert status == 2 and "nothing is recorded of new yet. There are: speed_far" in printed


def test_bench_holds_a_new_run_to_the_record_that_was_there_before(course):
    folder = course.unit.root / "benchmarks"
    folder.mkdir()
    (folder / "pace.py").write_text(
        '"""How fast it is."""\n\nimport sys\nfrom pathlib import Path\n\nfrom course.lab import recorded\n\n\ndef main():\n'
        "    for name in ('pace', 'pace_far'):\n        result = {'rows': [{'work': 'up', 'ours': float(sys.argv[1])}]}\n"
        "        recorded.save(name, result, Path(__file__).parent / 'recorded')\n"
    )
    status, printed = course("bench", "pace", "--check", "1.0")
    assert status == 0 and printed.count("there is nothing to hold it to") == 2 and "--recorded" not in printed
    status, printed = course("bench", "pace", "--check", "2.0")
    assert status == 0 and printed.count("Not as expected: 1 figure of 1 row") == 2
    assert [line.split() for line in printed.splitlines() if line.startswith("up ")] == [["up", "1.00", "2.00"]] * 2
    assert "course bench pace --recorded" in printed and "course bench pace_far --recorded" in printed


def test_bench_says_how_to_have_the_old_records_again(course, monkeypatch):
    """Lessons and notebooks quote what is in the folder, also what a reader measured."""
    folder = course.unit.root / "benchmarks"
    folder.mkdir()
    monkeypatch.setattr(recorded, "FOLDER", folder / "recorded")
    (folder / "recording.py").write_text(
        '"""How fast one counts."""\n\nfrom course.lab import recorded\n\ntable = str\n\n\ndef main():\n'
        '    recorded.save("recording", [{"how": "ours", "ms": 1.0}], recorded.FOLDER)\n'
    )
    file = r"benchmarks/recorded/[\w-]+/recording\.json"
    assert re.search(f"may quote this record from now on. Without it again: rm {file}\n", course("bench", "recording")[1])
    assert re.search(
        f"replaces what lessons and notebooks quote. The old record again: git restore {file}\n", course("bench", "recording")[1]
    )
    assert "Note" not in course("bench", "recording", "--recorded")[1]


def test_a_terminal_breaks_a_sentence_between_words(monkeypatch):
    said = io.StringIO()
    for terminal, printed in ((True, "one two three\nfour\n"), (False, "one two three four\n")):
        monkeypatch.setattr(
            cli.shared,
            "Console",
            lambda *, stderr, terminal=terminal, **more: Console(file=said, force_terminal=terminal, width=22, no_color=True, **more),
        )
        said.seek(0), said.truncate()
        cli.shared.say("one two three four")
        assert re.sub("\x1b[^m]*m", "", said.getvalue()).replace(" \n", "\n") == f"course: {printed}"


def test_lead_commands_are_wired():
    import inspect

    from course.demo import main as play
    from course.lab.pretrain import main as train

    inspect.signature(play).bind(Path("figure.png"))
    inspect.signature(train).bind()


# doctor


def test_doctor_examines_this_machine_for_real(course):
    status, printed = course("doctor")
    assert status == 0, printed
    assert "The course runs here." in printed
    for words in (
        "Python",
        "Packages",
        "CPU",
        "Memory",
        "Disk",
        "GPU",
        "Training step, cpu",
        "Tiny model, cpu",
        "bitsandbytes, cpu",
        "not asked",
    ):
        assert words in printed


def test_doctor_exits_with_1_only_if_something_needed_is_broken(course, monkeypatch):
    note, broken = (
        doctor.Finding("GPU", "none", doctor.NOTE, "not needed"),
        doctor.Finding("Packages", "torch is missing", doctor.BROKEN, "make setup"),
    )
    monkeypatch.setattr(doctor, "examine", lambda *arguments: [note])
    assert course("doctor")[0] == 0
    monkeypatch.setattr(doctor, "examine", lambda *arguments: [note, broken])
    status, printed = course("doctor")
    assert status == 1 and "make setup" in printed and "broken" in printed
