"""Benchmarks are scripts: this loads one as a module, under its own name, so that the next can import it."""

import importlib.util
import sys
from types import ModuleType

from course import ROOT


def script(name: str) -> ModuleType:
    """``benchmarks/<name>.py``. Load first what it imports from its own folder."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
