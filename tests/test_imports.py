"""Imports run one way, notebooks → course → reference, and a unit is whole once its notebook exists."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reference
from course import ROOT
from course.units import Unit, units

_ROW = re.compile(r"^ {4}(?P<unit>\d\d|any) {2,}(?P<modules>\S.*)$", re.MULTILINE)


def order(text: str) -> dict[str, str]:
    """Module -> unit, from the rows of ``reference``'s docstring: "02  lora (layer, inject), adapter_format"."""
    found: dict[str, str] = {}
    for row in _ROW.finditer(text):
        for name, inner in re.findall(r"(\w+)(?: \(([^)]*)\))?", row["modules"]):
            modules = [f"reference.{name}.{part.strip()}" for part in inner.split(",")] if inner else [f"reference.{name}"]
            assert not set(modules) & set(found), f"the map names {name} twice"
            found |= dict.fromkeys(modules, "00" if row["unit"] == "any" else row["unit"])
    return found


UNIT_OF = order(reference.__doc__)
TOOLS = {"torch", "numpy", "scipy", "safetensors"}  # what a reference module may use
RIVALS = {"transformers", "peft", "bitsandbytes"}  # what it is compared with


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {dotted(path): path for path in sorted((ROOT / "reference").rglob("*.py"))}
REFERENCE = [path for path in PATHS.values() if path.name != "__init__.py"]


def imports(path: Path, deferred: bool = True) -> set[str]:
    """Full names of all that the file imports: "torch.nn", "reference.lora.layer".

    A name that a package of ``reference`` hands on counts as the module that it is from.

    Args:
        deferred: those inside functions too, which are carried out at the call.
    """
    return _imports(path, deferred)


@functools.cache
def _imports(path: Path, deferred: bool) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda)) for part in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in inner and not deferred:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            for alias in node.names:
                found |= home(node.module, alias.name)
    return frozenset(found)


def home(module: str, name: str) -> set[str]:
    """Where ``from module import name`` gets it: the module that defines it, or a whole package's."""
    if (full := f"{module}.{name}") in PATHS:
        return _imports(PATHS[full], False) & set(PATHS) | {full} if PATHS[full].name == "__init__.py" else {full}
    if module not in PATHS or PATHS[module].name != "__init__.py":
        return {full} if module == "course" else {module}
    for node in ast.parse(PATHS[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in (alias.asname or alias.name for alias in node.names):
            return home(node.module, name)
    return {module}


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit_of(module: str) -> str | None:
    """Its own row's, or that of the folder it lies in."""
    return UNIT_OF.get(module) or (unit_of(module.rpartition(".")[0]) if "." in module else None)


def is_kernel(module: str) -> bool:
    return module.startswith("reference.kernels.")


@pytest.mark.parametrize("path", REFERENCE, ids=relative)
def test_reference_uses_torch_and_lower_modules_only(path: Path):
    module = dotted(path)
    assert tops(imports(path)) <= TOOLS | {"reference"} | ({"triton"} if is_kernel(module) else set())
    own = unit_of(module)
    assert own, f"put {module} into the map in reference/__init__.py, under its unit"
    for name in imports(path, deferred=False) & set(PATHS):
        assert unit_of(name) <= own, f"{module} of unit {own} imports {name} of unit {unit_of(name)}"
    later = {name for name in imports(path) & set(PATHS) if unit_of(name) > own}
    assert all(map(is_kernel, later)), f"{module} of unit {own} reaches for {later}: only kernels may be of a later unit, at the call"


def test_no_reference_modules_import_each_other_in_a_circle():
    graph = {dotted(path): imports(path, deferred=False) & set(PATHS) for path in REFERENCE}

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join((*above, module))
        for lower in graph.get(module, ()):
            visit(lower, (*above, module))

    for module in graph:
        visit(module, ())


def test_the_kernels_of_lora_do_without_those_of_nf4():
    code = "import sys, reference.kernels.low_rank; print([m for m in sys.modules if 'nf4' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if "No module named 'triton'" in run.stderr:
        pytest.skip("there is no Triton here")
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("path", REFERENCE, ids=relative)
def test_lines_of_reference_fit_a_page(path: Path):
    long = [i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 100]
    assert not long, f"lines {long} have more than 100 columns"


@pytest.mark.parametrize("path", sorted((ROOT / "course").rglob("*.py")), ids=relative)
def test_course_imports_no_tests_and_no_benchmarks(path: Path):
    assert not tops(imports(path)) & {"tests", "benchmarks", "conftest", "pytest", "notebooks", "exercises", "solutions"}


@pytest.mark.parametrize("path", sorted((ROOT / "course" / "checks").rglob("*.py")), ids=relative)
def test_checks_judge_by_the_reference_not_by_a_library(path: Path):
    assert not tops(imports(path)) & RIVALS


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=relative)
def test_benchmarks_import_no_tests(path: Path):
    assert not tops(imports(path)) & {"tests", "conftest", "pytest"}


@pytest.mark.parametrize("path", sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]), ids=relative)
def test_benchmarks_and_tests_leave_the_search_path_alone(path: Path):
    attributes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)]
    changed = [node for node in attributes if ast.unparse(node).startswith("sys.path.") or node.attr == "syspath_prepend"]
    changed += [node for node in attributes if ast.unparse(node) == "sys.path" and not isinstance(node.ctx, ast.Load)]
    assert not [node.lineno for node in changed], "import benchmarks in full: from benchmarks import nf4_kernels"


@pytest.mark.parametrize("path", REFERENCE, ids=relative)
def test_reference_modules_are_short_and_finished(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200, "one idea a file"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the docstring states the idea"
    raised = [ast.unparse(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    assert not any("NotImplementedError" in error for error in raised)


@pytest.mark.parametrize("unit", [unit for unit in units() if unit.notebook.exists()], ids=lambda unit: unit.stem)
def test_a_unit_is_whole(unit: Unit):
    parts = [unit.lesson, unit.notebook]
    if unit.topic != "interview":  # it practises the others' questions and exercises
        parts += [unit.exercise, unit.solution, unit.checks, unit.interview]
    assert [relative(part) for part in parts if not part.exists()] == []
    assert [module for module, number in UNIT_OF.items() if number == unit.number and module not in PATHS] == []


def test_every_reference_module_is_tested():
    """A test imports it, or a module that such a test reaches."""
    uses = {dotted(path): imports(path) for path in REFERENCE}
    reached, waiting = set(), {name for test in (ROOT / "tests").glob("test_*.py") for name in imports(test)}
    while waiting:
        name = waiting.pop()
        if name in uses and name not in reached:
            reached.add(name)
            waiting |= uses[name]
    assert set(uses) - reached == set()
