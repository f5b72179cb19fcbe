"""Shared by all tests: what a GPU is needed for is skipped without one, and a small course to try the machinery on."""

import os
from pathlib import Path

import miniature
import pytest

from course.units import Unit

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def small_course(tmp_path: Path) -> Unit:
    """The first unit of a course of two units in a folder of its own (``unit.root``)."""
    return miniature.make(tmp_path)
