"""The JupyterHub for a room, in a real browser: the instructor logs in, opens JupyterLab, and sees the class in Formgrader's frame."""

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from benchmarks.hub_load import Hub
from course import ROOT

SECONDS = 90_000  # in Playwright's unit, for what starts a server
LEARNER, UNIT = "ada", "02_lora"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub that serves a copy of the course, in which a class has begun and one notebook was handed in."""
    if not importlib.util.find_spec("jupyterhub"):
        pytest.skip("jupyterhub is not installed (pip install jupyterhub): the hub for a room is not tested")
    if not shutil.which("configurable-http-proxy"):
        pytest.skip("there is no configurable-http-proxy (npm install -g configurable-http-proxy): the hub for a room is not tested")
    root = tmp_path_factory.mktemp("hub") / "course copied"
    for name in ("course", "reference", "notebooks", "exercises", "solutions"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (root / "classroom").mkdir()
    for name in ("classroom/jupyterhub_config.py", "nbgrader_config.py"):
        shutil.copy(ROOT / name, root / name)
    students = root / "students.csv"
    students.write_text(f"id\n{LEARNER}\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "copied"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=root, check=True)
    command = [sys.executable, "-m", "course", "class", "init", "--students", str(students)]
    subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True, capture_output=True)
    handed_in = root / "classroom" / "submitted" / LEARNER / UNIT
    handed_in.mkdir(parents=True)
    shutil.copy(ROOT / "exercises" / f"{UNIT}.ipynb", handed_in)
    with Hub(tmp_path_factory.mktemp("hub"), root) as started:
        asyncio.run(started.ready())
        yield started


def enter(browser, hub, name: str, password: str):
    """A page on which ``name`` has logged in and JupyterLab is open; ``page.said`` is what its console shows."""
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    page.set_default_timeout(SECONDS)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.goto(f"{hub.address}/hub/login")
    page.fill("[name=username]", name)
    page.fill("[name=password]", password)
    page.click("[type=submit]")
    page.wait_for_url(f"**/user/{name}/lab/**")
    page.wait_for_function("window.jupyterapp || document.querySelector('#jp-menu-panel, .jp-MenuBar, .lm-MenuBar')")
    page.wait_for_selector(".jp-Notebook h1:has-text('What fills the GPU')")
    return page


def policy(page, hub, name: str) -> str:
    return page.request.get(f"{hub.address}/user/{name}/lab").headers["content-security-policy"]


def done(frame) -> None:
    """What Formgrader was asked to do has been done; close what says so."""
    said = frame.locator(".modal:visible")
    said.locator(".modal-title").wait_for()
    assert "Success" in said.locator(".modal-title").inner_text(), said.inner_text()
    said.locator(".modal-footer button").click()
    said.wait_for(state="detached")


def test_formgrader_opens_inside_jupyterlab_and_has_the_class(hub, browser):  # in this order: the hub is awaited, and Playwright has a loop
    page = enter(browser, hub, "instructor", hub.instructor)
    page.click(".lm-MenuBar-item:has-text('Nbgrader')")
    page.click(".lm-Menu-item:has-text('Formgrader')")
    frame = page.frame_locator("iframe[src*='formgrader']")
    row = frame.locator(f"tbody tr:has(td.name:has-text('{UNIT}'))")
    row.wait_for()
    assert frame.locator("tbody tr").count() == len(list((ROOT / "solutions").glob("*.ipynb")))
    assert [words for words in page.said if re.search("frame-ancestors|X-Frame-Options|Refused to", words)] == []
    assert "frame-ancestors 'self'" in policy(page, hub, "instructor")
    assert page.locator(".Toastify__toast").count() == 0, "nobody is asked whether Jupyter may send news"
    row.locator("td.assign a").click()
    done(frame)
    row.locator("td.num-submissions a").click()
    frame.locator("td.autograde a").click()
    done(frame)
    assert frame.locator("td.score").inner_text().startswith("0 / "), "the course's judge has graded an untouched exercise"
    page.context.close()


def test_a_learner_has_a_copy_and_no_frame(hub, browser):
    page = enter(browser, hub, LEARNER, hub.password)
    assert (hub.folder / "hub" / "homes" / LEARNER / "course" / "notebooks").is_dir()
    assert "frame-ancestors 'none'" in policy(page, hub, LEARNER)
    assert page.request.get(f"{hub.address}/user/instructor/lab").status in (403, 404)
    page.context.close()
