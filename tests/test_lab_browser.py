"""What `make lab` opens, in a real browser: a notebook runs, a slider moves its figure, an exercise is judged, a link opens a lesson."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from course import ROOT
from course.notebooks import as_text, is_answer, read

STEM = "03_blockwise_quantization"
SLIDER = 12  # the cell of the notebook that shows it; the cells after it are left out here
SECONDS = 60_000  # in Playwright's unit, for what starts a kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The parts of the course that the test writes to, copied; a cell that runs imports the course from where it is."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lessons", "exercises", "notebooks"):
        shutil.copytree(ROOT / name, folder / name)
    notebook = read(folder / "notebooks" / f"{STEM}.ipynb")
    assert "Slider" in notebook.cells[SLIDER].source
    notebook.cells = notebook.cells[: SLIDER + 1]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (folder / "notebooks" / f"{STEM}.ipynb").write_text(as_text(notebook))
    shutil.copytree(ROOT / "course" / "jupyter", folder / "course" / "jupyter")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def lab(folder: Path, tmp_path_factory):
    """The address of a server started by the very command of `make lab`, and the file in which its browser noted what it should open."""
    made = subprocess.run(["make", "--dry-run", "lab", "VENV=none"], cwd=folder, capture_output=True, text=True, check=True)
    command = next(line for line in made.stdout.splitlines() if "jupyter lab" in line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = tmp_path_factory.mktemp("jupyter")
    command = command.replace("none/bin/python", sys.executable)
    command += f" --allow-root --expose-app-in-browser --ServerApp.port={port} --IdentityProvider.token=secret"
    command += f" --LabApp.workspaces_dir={own} --LabApp.user_settings_dir={own}"
    log, browser = own / "log", own / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {own}/opened\n')
    browser.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(own), "BROWSER": str(browser)}
    with log.open("w") as stream:
        server = subprocess.Popen(command, shell=True, cwd=folder, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=secret", timeout=20)
                if (own / "opened").exists():
                    break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", own / "opened"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGINT)  # the server ends its kernels, which have groups of their own
            os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def page(browser, lab):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(SECONDS)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    page.evaluate("window.jupyterapp?.serviceManager.sessions.shutdownAll()")
    page.close()


def go_to(page, lab, path: str) -> None:
    page.goto(f"{lab[0]}/lab/tree/{path}?token=secret&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")


def run_all(page) -> None:
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def test_it_opens_at_the_first_notebook_and_the_root(page, lab):
    page.goto(lab[1].read_text().strip())
    page.wait_for_url("**/lab/tree/notebooks/00_memory_budget.ipynb**")
    page.wait_for_selector(".jp-Notebook h1:has-text('What fills the GPU')")
    page.goto(f"{lab[0]}/lab?token=secret&reset")
    for name in ("lessons", "notebooks", "exercises"):
        page.wait_for_selector(f".jp-DirListing-item:has-text('{name}')")
    page.dblclick(".jp-DirListing-item:has-text('lessons')")
    page.dblclick(".jp-DirListing-item:has-text('00_memory_budget.md')")
    page.wait_for_selector(".jp-MarkdownViewer h1:has-text('What fills the GPU')")
    assert page.locator(".Toastify__toast").count() == 0, "nobody is asked whether Jupyter may send news"


def test_a_slider_moves_its_figure(page, lab):
    go_to(page, lab, f"notebooks/{STEM}.ipynb")
    run_all(page)
    slider = page.locator(".widget-slider .noUi-handle").first
    slider.wait_for()
    figure = page.locator(".jp-Cell:has(.widget-slider) img.widget-image").first
    figure.wait_for()
    before = figure.get_attribute("src")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("([image, before]) => image.src !== before", arg=[figure.element_handle(), before])
    assert page.locator(".jp-Cell [data-mime-type='application/vnd.jupyter.stderr']:has-text('Error')").count() == 0


def test_an_exercise_is_judged_before_and_after_it_is_answered(page, lab):
    go_to(page, lab, f"exercises/{STEM}.ipynb")
    worked = next(cell for cell in read(ROOT / "solutions" / f"{STEM}.ipynb").cells if is_answer(cell))
    page.evaluate(
        """async () => {
             const book = window.jupyterapp.shell.currentWidget.content;
             const run = async (i) => { book.activeCellIndex = i; book.deselectAll();
                                        await window.jupyterapp.commands.execute("notebook:run-cell"); };
             window.book = book;
             window.judge = async (source) => {
               const cells = [...book.model.cells].map((cell) => cell.sharedModel.getSource());
               const [answer, check] = [
                 cells.findIndex((c) => c.startsWith("def absmax_int8")),
                 cells.findIndex((c) => c.startsWith("check.absmax")),
               ];
               if (source) book.model.cells.get(answer).sharedModel.setSource(source);
               for (const i of [1, answer, check]) await run(i);
               const outputs = book.model.cells.get(check).outputs;
               return JSON.stringify([...Array(outputs.length).keys()].map((i) => outputs.get(i).toJSON()));
             };
           }"""
    )
    stub, answered = (page.evaluate("(source) => window.judge(source)", source) for source in (None, worked.source))
    assert "nothing here yet" in stub.lower() and "✓" not in stub, stub
    assert "✓" in answered, answered


def test_a_link_to_a_lesson_opens_it_as_it_reads(page, lab):
    page.locator(f".jp-RenderedMarkdown a[href*='lessons/{STEM}.md']").first.click()
    page.wait_for_selector(".jp-MarkdownViewer h1:has-text('Blockwise quantization')")


def test_nothing_was_asked_of_another_machine(page, lab):
    here = ("http://127.0.0.1:", "http://localhost:", "data:", "blob:", "file:")
    assert [address for address in page.asked if not address.startswith(here)] == []
