"""Imports run one way, notebooks → course → reference, and a unit is whole once its notebook exists."""

import ast
import sys
from pathlib import Path

import pytest

from course import ROOT
from course.units import Unit, units

# The reference modules of each unit, in the course's order; a module may import its own unit's and earlier ones'.
ORDER = {
    "00": ["model_shapes", "activations", "recipes", "memory"],
    "01": ["lowrank"],
    "02": ["lora_mixed", "lora_base", "lora_layers", "lora", "tensor_file", "adapter_format"],
    "03": ["blockwise"],
    "04": ["nf4"],
    "05": ["double_quant"],
    "06": ["chunked_loss", "llama", "fast_step", "nf4_product", "nf4_ops", "nf4_format", "qlora_layer", "qlora_merge", "qlora"],
    "07": ["paging", "offload"],
    "08": ["checkpointing", "precision"],
    "09": ["ewc", "rehearsal", "progressive"],
    "10": ["bottleneck", "soft_prompts", "ia3"],
    "11": ["multi_lora"],
    "12": ["instruct"],
}
UNIT_OF = {module: unit for unit, modules in ORDER.items() for module in modules}
REFERENCE = sorted(path for path in (ROOT / "reference").rglob("*.py") if path.name != "__init__.py")
TOOLS = {"torch", "numpy", "scipy", "safetensors"}  # what a reference module may use
PACKAGES = {"reference", "reference.kernels", "course"}  # whose modules are imported by name
RIVALS = {"transformers", "peft", "bitsandbytes"}  # what it is compared with


def imports(path: Path) -> set[str]:
    """Full names of all that the file imports, wherever in it: "torch.nn", "reference.lora"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module in PACKAGES else {node.module}
    return found


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", REFERENCE, ids=relative)
def test_reference_uses_torch_and_lower_modules_only(path: Path):
    names = imports(path)
    kernel = path.parent.name == "kernels"
    assert tops(names) <= TOOLS | {"reference"} | ({"triton"} if kernel else set())
    own = "06" if kernel else UNIT_OF.get(path.stem)  # kernels are for what unit 06 has built with
    assert own, f"{relative(path)}: put it into ORDER above, under its unit"
    for name in names:
        if name.startswith("reference."):
            module = name.split(".")[1]
            if module != "kernels":
                assert UNIT_OF.get(module, "?") <= own, (
                    f"{relative(path)} of unit {own} imports {module} of unit {UNIT_OF.get(module, '?')}"
                )


def test_no_reference_modules_import_each_other_in_a_circle():
    graph = {
        path.stem: {n.split(".")[1] for n in imports(path) if n.startswith("reference.")}
        for path in REFERENCE
        if path.parent.name == "reference"
    }

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join((*above, module))
        for lower in graph.get(module, ()):
            visit(lower, (*above, module))

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", sorted((ROOT / "course").rglob("*.py")), ids=relative)
def test_course_imports_no_tests_and_no_benchmarks(path: Path):
    assert not tops(imports(path)) & {"tests", "benchmarks", "conftest", "pytest", "notebooks", "exercises", "solutions"}


@pytest.mark.parametrize("path", sorted((ROOT / "course" / "checks").glob("*.py")), ids=relative)
def test_checks_judge_by_the_reference_not_by_a_library(path: Path):
    assert not tops(imports(path)) & RIVALS


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=relative)
def test_benchmarks_import_no_tests(path: Path):
    assert not tops(imports(path)) & {"tests", "conftest", "pytest"}


@pytest.mark.parametrize("path", REFERENCE, ids=relative)
def test_reference_modules_are_short_and_finished(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 230, "one idea a file, about 200 lines"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the docstring states the idea"
    raised = [ast.unparse(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    assert not any("NotImplementedError" in error for error in raised)


@pytest.mark.parametrize("unit", [unit for unit in units() if unit.notebook.exists()], ids=lambda unit: unit.stem)
def test_a_unit_is_whole(unit: Unit):
    parts = (unit.lesson, unit.notebook, unit.exercise, unit.solution, unit.checks, unit.interview)
    assert [relative(part) for part in parts if not part.exists()] == []
    missing = [module for module in ORDER.get(unit.number, []) if not (ROOT / "reference" / f"{module}.py").exists()]
    assert missing == []


def test_every_reference_module_is_tested():
    """A test imports it, or a module that such a test reaches."""
    uses = {f"reference.{path.stem}": imports(path) for path in REFERENCE if path.parent.name == "reference"}
    uses |= {f"reference.kernels.{path.stem}": imports(path) for path in REFERENCE if path.parent.name == "kernels"}
    reached, waiting = set(), {name for test in (ROOT / "tests").glob("test_*.py") for name in imports(test)}
    while waiting:
        name = waiting.pop()
        if name in uses and name not in reached:
            reached.add(name)
            waiting |= uses[name]
    assert set(uses) - reached == set()


def test_the_order_knows_a_module_once():
    assert len(UNIT_OF) == sum(map(len, ORDER.values()))
