"""Unit 13's judges in processes of their own: with a GPU, and after whatever else a grader has loaded."""

import importlib.util
import os
import subprocess
import sys

import pytest

from course import ROOT, doctor
from course.lab import kernel_trace
from course.units import CourseError

JUDGED = ["tests/test_checks.py", "tests/test_checks_kernels.py"]
if importlib.util.find_spec("nbgrader"):  # which lays the solutions' stubs out
    JUDGED.append("tests/test_solutions.py")


def python(*words: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=600)


@pytest.mark.gpu
@pytest.mark.skipif(bool(kernel_trace.misfit()), reason=kernel_trace.misfit())
def test_with_a_gpu_its_judges_are_tested_where_none_is_seen():
    done = python("-m", "pytest", "-q", "-k", "kernels", *JUDGED, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


AFTER_ALL_OTHERS = """
import importlib, pkgutil, course.checks
names = sorted(info.name for info in pkgutil.iter_modules(course.checks.__path__))
names.remove("kernels")
checks = [importlib.import_module(f"course.checks.{name}") for name in [*names, "kernels"]][-1]
checks.histogram(checks.histogram.reference)
"""


def test_one_process_can_grade_every_unit():
    """As nbgrader does: no judge loaded before has Triton compile kernels."""
    pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")
    done = python("-c", AFTER_ALL_OTHERS)
    assert done.returncode == 0 and done.stdout.startswith("✓"), done.stderr[-2000:]


def test_a_process_that_compiles_kernels_is_told_what_to_do():
    pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")
    done = python("-c", "import triton.language\nfrom course.lab.kernel_trace import interpret\ninterpret()")
    assert "RuntimeError: Triton was loaded to compile kernels" in done.stderr and "restart" in done.stderr


@pytest.mark.parametrize("triton, numpy, fits", [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)])
def test_versions_that_do_not_fit_are_named_with_the_remedy(monkeypatch, triton, numpy, fits):
    monkeypatch.setattr(kernel_trace.metadata, "version", lambda name: triton)
    monkeypatch.setattr(kernel_trace.np, "__version__", numpy)
    if fits:
        return kernel_trace.interpret()
    with pytest.raises(CourseError, match=r"Triton 3\.6\.0 can't interpret kernels with NumPy 2\.4\.6: pip install"):
        kernel_trace.interpret()


def test_the_doctor_says_whether_kernels_can_be_interpreted(monkeypatch):
    assert doctor.interpreter().state == doctor.OK
    monkeypatch.setattr(kernel_trace, "misfit", lambda: "versions that don't fit: another one")
    finding = doctor.interpreter()
    assert finding.state == doctor.NOTE and finding.mend == "versions that don't fit: another one"
