"""Shared by all tests: what a GPU is needed for is skipped without one, and a small course to try the machinery on."""

import os
import random
import shutil
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which reads it once: kernels then run on the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

import hypothesis
import miniature
import pytest

from course import checking
from course.units import Unit

# The same examples every time, so that a test fails where it was broken and nowhere else; `--hypothesis-profile=default` searches further.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def the_same_numbers_every_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's random numbers depend on its own name, not on what ran before it. The same holds for the inputs that checks draw."""
    own = random.Random(request.node.nodeid)
    torch.manual_seed(own.randrange(2**31))
    monkeypatch.setattr(checking, "fresh_seed", lambda: own.randrange(2**31))


@pytest.fixture
def small_course(tmp_path: Path) -> Unit:
    """The first unit of a course of two units in a folder of its own (``unit.root``)."""
    return miniature.make(tmp_path)


@pytest.fixture(scope="module")
def browser():
    """Chromium, in which a test looks at what learners see."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no Chromium on this machine: nothing is tested in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()
