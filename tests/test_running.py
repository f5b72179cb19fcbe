"""Notebooks in kernels of their own: what is measured, what is reported, and how what never ends is ended."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zmq
from jupyter_client.channels import AsyncZMQSocketChannel
from nbformat import v4

from course import running
from course.running import Limits, execute


@pytest.fixture(autouse=True)
def little_grace(monkeypatch):
    monkeypatch.setattr(running, "GRACE_SECONDS", 1.0)


def notebook(*sources: str):
    return v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])


def texts(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_a_notebook_runs_top_to_bottom_in_its_folder_and_in_this_environment(tmp_path: Path):
    (tmp_path / "here.txt").write_text("found")
    made, seen = notebook("x = open('here.txt').read()", "import sys; print(x, sys.executable)", "x"), []
    made.cells.insert(1, v4.new_markdown_cell("not run"))
    result = execute(made, tmp_path, before_cell=seen.append)
    assert result.troubles == [] and not result.died
    assert texts(made.cells[2]) == f"found {sys.executable}\n"
    assert made.cells[3].outputs[0].data["text/plain"] == "'found'"
    assert seen == [0, 2, 3]
    assert [cell.execution_count for cell in made.cells if cell.cell_type == "code"] == [1, 2, 3]


def test_kernels_use_one_thread_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch):
    asked = notebook("import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['OMP_WAIT_POLICY'])")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    execute(asked, tmp_path)
    assert texts(asked.cells[0]) == "1 ACTIVE\n"


def test_time_and_memory_are_the_kernels_with_its_children(tmp_path: Path):
    child = "import time; held = bytearray(150_000_000); time.sleep(0.6)"
    made = notebook(f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {child!r}])", "time.sleep(0.3)")
    result = execute(made, tmp_path)
    assert 0.9 < result.seconds < 30
    assert 180e6 < result.peak_bytes < 600e6  # the child's 150 MB and an interpreter or two


def test_the_first_error_ends_the_run_and_is_located(tmp_path: Path):
    made = notebook("def f():\n    return 1 / 0", "a = 1\n\nf()", "print('never')")
    (trouble,) = execute(made, tmp_path).troubles
    assert (trouble.cell, trouble.kind, trouble.message, trouble.line) == (1, "ZeroDivisionError", "division by zero", 3)
    assert str(trouble) == "ZeroDivisionError: division by zero"
    assert made.cells[2].outputs == []


def test_errors_can_be_passed_over_and_expected_ones_are_none(tmp_path: Path):
    made = notebook("1 / 0", "x = )", "raise KeyError", "print('reached')")
    made.cells[0].metadata["tags"] = ["raises-exception"]
    result = execute(made, tmp_path, allow_errors=True)
    assert [(trouble.cell, trouble.kind) for trouble in result.troubles] == [(1, "SyntaxError"), (2, "KeyError")]
    assert str(result.troubles[1]) == "KeyError"
    assert texts(made.cells[3]) == "reached\n"


def test_sliders_and_their_outputs_run_too(tmp_path: Path):
    slider = "import ipywidgets as widgets\nfrom IPython.display import display\n\nshown = widgets.Output()\ndisplay(shown)"
    moved = "knob = widgets.IntSlider(3)\nknob.observe(lambda change: shown.append_stdout(str(change['new'])), 'value')\nknob.value = 4"
    used = "with shown:\n    print('inside')\nwidgets.interact(lambda x: print(x), x=(0, 9));"
    assert execute(notebook(slider, moved, used), tmp_path).troubles == []


def test_a_reply_that_wakes_nobody_up_is_found(tmp_path: Path, monkeypatch):
    """As when a widget's answer is sent while the reply comes in: who waits without end waits for ever."""
    wait = AsyncZMQSocketChannel.get_msg

    async def deaf(channel, timeout=None):
        replies = channel.socket.socket_type == zmq.DEALER
        return await (asyncio.sleep(3600) if replies and timeout is None else wait(channel, timeout))

    monkeypatch.setattr(AsyncZMQSocketChannel, "get_msg", deaf)
    made = notebook("import time; time.sleep(1.5)", "2")
    assert execute(made, tmp_path, Limits(cell_seconds=20)).troubles == []
    assert made.cells[1].outputs[0].data["text/plain"] == "2"


@pytest.mark.parametrize(
    "hides",
    [
        "import rich.traceback; rich.traceback.install()",
        "get_ipython().showtraceback = lambda *a, **k: None",
        "get_ipython()._showtraceback = lambda *a, **k: None",
        "import sys; sys.excepthook = lambda *a: None",
        "print('x' * 3_000_000)",
    ],
)
def test_an_error_that_is_not_shown_is_one(tmp_path: Path, hides: str):
    made = notebook(f"{hides}\n1 / 0", "1 / 0")
    troubles = execute(made, tmp_path, allow_errors=True).troubles
    assert [(trouble.cell, trouble.kind) for trouble in troubles] == [(0, "ZeroDivisionError"), (1, "ZeroDivisionError")]


def test_a_magic_that_does_not_exist_fails(tmp_path: Path):
    (trouble,) = execute(notebook("%nosuchmagic"), tmp_path).troubles
    assert trouble.kind == "UsageError"


def test_an_error_that_is_shown_and_caught_is_none(tmp_path: Path):
    made = notebook("try:\n    1 / 0\nexcept ZeroDivisionError:\n    get_ipython().showtraceback()")
    assert execute(made, tmp_path).troubles == []


def test_nobody_waits_for_input(tmp_path: Path):
    (trouble,) = execute(notebook("input('name? ')"), tmp_path).troubles
    assert trouble.kind == "StdinNotImplementedError"


def test_an_endless_loop_is_interrupted_and_the_kernel_lives_on(tmp_path: Path):
    made = notebook("x = 1", "while True:\n    pass", "print(x)")
    result = execute(made, tmp_path, Limits(cell_seconds=1), allow_errors=True)
    (trouble,) = result.troubles
    assert (trouble.cell, trouble.kind) == (1, "Stopped")
    assert str(trouble) == "stopped after 1 s: is there an endless loop?"
    assert texts(made.cells[2]) == "1\n" and not result.died


def test_a_loop_that_cannot_be_interrupted_is_killed(tmp_path: Path):
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass"
    result = execute(notebook("x = 1", deaf, "print(x)"), tmp_path, Limits(cell_seconds=1), allow_errors=True)
    assert result.died and [(trouble.cell, trouble.kind) for trouble in result.troubles] == [(1, "Stopped")]
    assert result.seconds < 30


def test_an_endless_loop_that_prints_fills_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(running, "OUTPUT_CHARACTERS", 10_000)
    made = notebook("while True:\n    print('again' * 100)")
    result = execute(made, tmp_path, Limits(cell_seconds=1), allow_errors=True)
    assert result.troubles[0].kind == "Stopped"
    assert len(texts(made.cells[0])) <= 10_000


def test_the_time_for_the_whole_notebook(tmp_path: Path):
    result = execute(
        notebook("import time", "time.sleep(60)", "1"), tmp_path, Limits(cell_seconds=None, total_seconds=2), allow_errors=True
    )
    assert result.died and str(result.troubles[0]) == "stopped: the time for the whole notebook, 2 s, was over"


def test_a_memory_bomb_is_stopped(tmp_path: Path):
    bomb = "held = []\nwhile True:\n    held.append(b'x' * 20_000_000)"
    result = execute(notebook(bomb), tmp_path, Limits(memory_bytes=400_000_000), allow_errors=True)
    assert result.died and str(result.troubles[0]) == "stopped: it used more than 0.4 GB of memory"
    assert result.peak_bytes < 3e9


@pytest.mark.parametrize(
    "source, words",
    [
        ("import os; os._exit(3)", "the kernel ended with exit status 3"),
        ("import os; os._exit(0)", "the kernel ended"),
        ("import ctypes; ctypes.string_at(0)", "the kernel was ended by SIGSEGV (a crash in compiled code)"),
        ("import os; os.kill(os.getpid(), 9)", "the kernel was ended by SIGKILL (often the system, when memory runs out)"),
    ],
)
def test_a_crash_is_reported_in_words(tmp_path: Path, source: str, words: str):
    result = execute(notebook(source, "print('never')"), tmp_path, allow_errors=True)
    assert result.died and [str(trouble) for trouble in result.troubles] == [words]


@pytest.mark.parametrize("settings", ["", ", start_new_session=True"])
def test_what_a_cell_started_ends_with_the_kernel(tmp_path: Path, settings: str):
    start = f"import os, subprocess, time\nprint(subprocess.Popen(['sleep', '300']{settings}).pid, flush=True)\ntime.sleep(0.5)"
    made = notebook(start, "os._exit(1)")
    execute(made, tmp_path, allow_errors=True)
    child = int(texts(made.cells[0]))
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child process is still running"
        time.sleep(0.05)


def test_old_outputs_and_tagged_cells_are_not_mistaken_for_new_ones(tmp_path: Path):
    made = notebook("print('new')", "raise ValueError")
    for cell in made.cells:
        cell.outputs = [v4.new_output("error", ename="Old", evalue="", traceback=[])]
    made.cells[1].metadata["tags"] = ["skip-execution"]
    assert execute(made, tmp_path).troubles == []
    assert made.cells[1].outputs == []


def test_ctrl_c_ends_the_kernel_too(tmp_path: Path):
    """As in a terminal: the interrupt goes to the command, which ends at once and leaves no kernel behind."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom nbformat import v4\nfrom course import running\n"
        "made = v4.new_notebook(cells=[v4.new_code_cell(\"import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)\")])\n"
        "try:\n    running.execute(made, Path(sys.argv[1]))\nexcept KeyboardInterrupt:\n    sys.exit(130)"
    )
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # also where these tests run in the background
    command = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True, **heeds)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, printed = command.communicate(timeout=30)
    assert (command.returncode, printed) == (130, "")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_signals_are_named():
    assert running.cause_of_death(-signal.SIGTERM) == "the kernel was ended by SIGTERM"
    assert running.cause_of_death(None) == "the kernel ended"
