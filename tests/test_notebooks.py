"""Notebooks as they are committed: whole, readable, with their outputs. That they run is tested by nbval, cell by cell, in `make test`."""

import ast
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import v4

from course import ROOT, build
from course.notebooks import KERNEL, as_text, read
from course.units import Unit, units

WRITTEN = [unit for unit in units() if unit.notebook.exists()]
every_unit = pytest.mark.parametrize("unit", WRITTEN, ids=lambda unit: unit.stem)
OF_A_MACHINE = re.compile(r"(?<![\w./~-])/(?:home|root|tmp|Users|var|opt|mnt|work)/|[A-Z]:\\\\")


def code_cells(unit: Unit) -> list:
    return [cell for cell in read(unit.notebook).cells if cell.cell_type == "code"]


def texts(cell) -> list[str]:
    """The source and every output that a reader sees as text."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found.append(output.get("text", ""))
        found += [text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
    return [text if isinstance(text, str) else str(text) for text in found]


@every_unit
def test_it_ran_from_top_to_bottom_in_a_fresh_kernel(unit: Unit):
    counts = [cell.execution_count for cell in code_cells(unit) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), "run it again with `course run --save`"


@every_unit
def test_outputs_are_committed_and_none_is_an_error(unit: Unit):
    cells = code_cells(unit)
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) / 3
    for cell in cells:
        for output in cell.outputs:
            expected = "raises-exception" in cell.metadata.get("tags", [])
            assert output.output_type != "error" or expected, f"{output.get('ename')}: {output.get('evalue')}"


@every_unit
def test_it_is_not_too_long(unit: Unit):
    cells = read(unit.notebook).cells
    lengths = [len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code"]
    assert len(cells) <= 40
    assert statistics.median(lengths) < 10
    assert max(lengths) <= 25
    assert unit.notebook.stat().st_size < 3_000_000


@every_unit
def test_it_opens_with_its_question_and_what_it_takes(unit: Unit):
    first = read(unit.notebook).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "?" in first.source
    for words in ("you will be able", "minutes", "needs"):
        assert words in " ".join(first.source.lower().replace("you'll", "you will").split()), f"the opening cell doesn't say {words!r}"


@every_unit
def test_every_picture_has_an_alt_text_and_a_caption(unit: Unit):
    for cell in code_cells(unit):
        for index, output in enumerate(cell.outputs):
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("image/png", {}).get("alt", "")
                assert len(alt.split()) >= 4, f"no alt text; show figures with plotting.show: {cell.source[:60]!r}"
                following = cell.outputs[index + 1] if index + 1 < len(cell.outputs) else {}
                caption = following.get("data", {}).get("text/markdown", "")
                assert re.fullmatch(r"\*.+\*", caption, re.DOTALL), f"no caption: {cell.source[:60]!r}"
            assert "image/svg+xml" not in output.get("data", {}) and "image/jpeg" not in output.get("data", {})


@every_unit
def test_it_names_no_place_on_somebodys_machine(unit: Unit):
    for cell in read(unit.notebook).cells:
        for text in texts(cell):
            assert not OF_A_MACHINE.search(text), text[:200]
            assert str(ROOT) not in text


@every_unit
def test_its_metadata_is_plain(unit: Unit):
    notebook = read(unit.notebook)
    assert notebook.metadata.kernelspec == KERNEL
    assert "jupytext" not in notebook.metadata and "widgets" not in notebook.metadata


def test_notebooks_and_solutions_are_tidy():
    assert [derived.path.name for derived in build.notebooks() if not derived.fresh] == [], "run `course build`"


@every_unit
def test_it_seeds_compares_and_asserts(unit: Unit):
    """A seed; the reference module; at least one assertion."""
    source = "\n".join(cell.source for cell in code_cells(unit) if not cell.source.startswith("%"))
    names = {node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert any(name.partition(".")[0] == "reference" for name in names), "it never compares with the reference module"
    assert re.search(r"\b(seed_everything|manual_seed)\(", source), "it sets no seed"
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source))), "it asserts nothing"


@every_unit
def test_some_outputs_are_compared(unit: Unit):
    checked = [cell for cell in code_cells(unit) if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert checked, "tag the cells whose output is the same on every machine with nbval-check-output"
    assert all(cell.outputs for cell in checked)


def nbval_options() -> list[str]:
    """The options that `make test` gives to pytest for notebooks."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t$(PYTEST)")]
    words = shlex.split(line)
    assert "notebooks" in words and "tests" in words
    return [f"{name}={words[words.index(name) + 1]}" if name.endswith("timeout") else name for name in words if name.startswith("--nbval")]


def test_nbval_compares_the_tagged_outputs_and_runs_the_others(tmp_path: Path):
    """nbval with the options of `make test`: a wrong saved output fails in a tagged cell, and is let pass in another; errors fail."""

    def cell(source: str, saved: str, tagged: bool):
        made = v4.new_code_cell(source, outputs=[v4.new_output("stream", text=saved)], execution_count=1)
        made.metadata["tags"] = ["nbval-check-output"] * tagged
        return made

    cells = [cell("print(1)", "1\n", True), cell("print(2)", "other\n", False), cell("print(3)", "other\n", True), cell("1 / 0", "", False)]
    (tmp_path / "small.ipynb").write_text(as_text(v4.new_notebook(cells=cells)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *nbval_options(), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 2 passed" in done.stdout
    assert "Cell 2" in done.stdout and "Cell 3" in done.stdout
