"""The judges are judged: every check takes two right answers, refuses the stub politely, and names every known mistake in its own words."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from interpreted import COMPILES
from torch import nn

import course.checks
from course.checking import Check, NotYet
from course.notebooks import is_answer, is_check, marks, read
from course.units import Unit, units

SEEDS = (0, 1, 2)


def all_checks() -> dict[str, Check]:
    """ "lora.forward" -> the check, for every public Check of every module in course/checks."""
    found = {}
    for info in pkgutil.iter_modules(course.checks.__path__):
        if info.name == "kernels" and COMPILES:
            continue  # see tests/interpreted.py
        module = importlib.import_module(f"course.checks.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, Check) and not name.startswith("_"):
                found[f"{info.name}.{name}"] = value
    return found


CHECKS = all_checks()
MISTAKES = [
    pytest.param(check, message, id=f"{name}-{number}")
    for name, check in CHECKS.items()
    for number, message in enumerate(check.misconceptions, 1)
]
every_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())


def refusal(check: Check, answer, seed: int) -> str:
    with pytest.raises(NotYet) as caught:
        check._judge(answer, seed)
    return str(caught.value)


def unwritten(*arguments, **settings):
    raise NotImplementedError()


def stubs(reference) -> list:
    """What a learner has before writing anything: a function that raises, or a class in which the constructor or every method does."""
    if not isinstance(reference, type):
        return [unwritten]
    written = {
        name: value
        for owner in reversed(reference.__mro__)
        if owner not in (object, nn.Module) and not owner.__module__.startswith("torch.")
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and not name.startswith("__")
    }
    made = [type("Stub", (reference,), {"__init__": unwritten})]
    return made + [type("Stub", (reference,), dict.fromkeys(written, unwritten))] * bool(written)


def test_there_are_checks():
    assert CHECKS


@every_check
@pytest.mark.parametrize("which", ["reference", "second"])
def test_right_answers_pass(check, which):
    for seed in SEEDS:
        check._judge(getattr(check, which), seed)


@every_check
def test_every_observation_has_a_label_of_its_own(check):
    """Of two with one label only the last would be judged."""
    seen = check.observe(check.reference, SEEDS[0])
    labels = [label for label, _ in seen] if not isinstance(seen, dict) else list(seen)
    assert sorted(labels) == sorted(set(labels))


@every_check
def test_two_right_answers_are_two(check):
    assert check.second is not check.reference
    if inspect.isfunction(check.second) and inspect.isfunction(check.reference):
        assert check.second.__code__.co_code != check.reference.__code__.co_code or check.second.__closure__ != check.reference.__closure__


@every_check
def test_the_stub_is_refused_politely(check):
    for stub in stubs(check.reference):
        assert refusal(check, stub, SEEDS[0]).startswith("nothing here yet")


@every_check
def test_an_answer_that_does_nothing_is_refused(check):
    for seed in SEEDS:
        assert refusal(check, lambda *arguments, **settings: None, seed)


@every_check
def test_there_are_four_misconceptions_that_say_something(check):
    assert len(check.misconceptions) >= 4
    for message in check.misconceptions:
        assert len(message.split()) >= 5, message


@pytest.fixture(scope="module")
def known_runs():
    """Runs of the reference and of the known mistakes, kept: each would otherwise run once for every later one, quadratically often."""
    return {}


@pytest.mark.parametrize("check, message", MISTAKES)
def test_every_misconception_is_named(check, message, known_runs, monkeypatch):
    run = Check._run

    def run_once(check, answer, seed, seen=None):
        if answer is mistaken:
            return run(check, answer, seed, seen)  # as the learner's answer and as the known mistake: really twice
        key = (id(check), id(answer), seed)
        if key not in known_runs:
            found, error = {}, None
            try:
                run(check, answer, seed, found)
            except Exception as failed:
                error = failed
            known_runs[key] = found, error
        found, error = known_runs[key]
        if seen is not None:
            seen.update(found)
        if error:
            raise error
        return found

    monkeypatch.setattr(Check, "_run", run_once)
    mistaken = check.wrong(message)
    for seed in SEEDS:
        assert refusal(check, mistaken, seed) == message


@every_check
def test_judging_leaves_everything_as_it_was(check, capsys):
    before = torch.random.get_rng_state()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    check(check.reference)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (grad, threads) == (torch.is_grad_enabled(), torch.get_num_threads())
    assert (dtype, deterministic) == (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
    printed = capsys.readouterr()
    assert printed.out == f"✓ {check.task}\n"
    assert printed.err == ""  # nbgrader gives no points where a check cell writes to stderr


# the notebooks that use the checks


SOLVED = [unit for unit in units() if unit.solution.exists() and not (unit.topic == "kernels" and COMPILES)]


def checks_named_in(path: Path) -> dict[str, str]:
    """Grade id of each check cell -> "module.check" that its one line calls."""
    notebook, modules, found = read(path), {}, {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tree = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "course.checks":
                modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        if is_check(cell):
            assert len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr), f"{path.name}: a check cell is one line: {cell.source!r}"
            call = tree.body[0].value
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute), f"{path.name}: {cell.source!r}"
            module = modules.get(getattr(call.func.value, "id", None))
            assert module, f"{path.name}: {cell.source!r} is not a check of course.checks"
            found[marks(cell)["grade_id"]] = f"{module}.{call.func.attr}"
    return found


@pytest.mark.parametrize("unit", SOLVED, ids=lambda unit: unit.stem)
def test_exercises_and_checks_belong_together(unit: Unit):
    named = list(checks_named_in(unit.solution).values())
    assert set(named) <= set(CHECKS), "a check cell names a check that doesn't exist"
    own = {name for name in CHECKS if name.startswith(f"{unit.topic}.")}
    assert set(named) == own, "every check of the unit has its exercise, and every exercise has its check"
    assert len(named) == len(set(named))
    assert 3 <= len(named) <= 6


@pytest.mark.parametrize("unit", SOLVED, ids=lambda unit: unit.stem)
def test_solutions_are_in_nbgraders_format(unit: Unit):
    notebook = read(unit.solution)
    answers = [cell for cell in notebook.cells if is_answer(cell)]
    assert len(answers) >= 3
    for cell in answers:
        assert cell.source.count("### BEGIN SOLUTION") == cell.source.count("### END SOLUTION") >= 1, marks(cell)["grade_id"]
        assert cell.cell_type == "code" and not marks(cell)["locked"]
    for cell in notebook.cells:
        if is_check(cell):
            assert marks(cell)["points"] > 0 and marks(cell)["locked"] and not marks(cell)["solution"]
    ids = [marks(cell)["grade_id"] for cell in notebook.cells if marks(cell)]
    assert len(ids) == len(set(ids))
    discussions = [cell for cell in notebook.cells if "solution-only" in cell.metadata.get("tags", [])]
    assert len(discussions) >= len(checks_named_in(unit.solution)), "each exercise has its discussion"


@pytest.mark.parametrize("unit", SOLVED, ids=lambda unit: unit.stem)
def test_every_exercise_opens_with_its_header(unit: Unit):
    """Difficulty, minutes and how often interviewers ask it, in the text above the answer."""
    notebook, above = read(unit.solution), ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            above += "\n" + cell.source
        elif is_check(cell):
            for words in ("●", "minutes", "asked in interviews"):
                assert words in above.lower(), f"the exercise of {marks(cell)['grade_id']} doesn't say {words!r}"
            above = ""


def test_stubs_are_made_for_functions_and_classes():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = 1

        def forward(self, x):
            return x

    no_constructor, no_methods = stubs(Layer)
    with pytest.raises(NotImplementedError):
        no_constructor()
    with pytest.raises(NotImplementedError):
        no_methods()(1)
    assert stubs(len) == [unwritten]
