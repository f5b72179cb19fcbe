"""The memory calculator: a page on which ``reference.memory``, translated to JavaScript, answers while one turns its knobs."""

from pathlib import Path

from course.website.javascript import translate

MODULES = ("arguments", "model_shapes", "memory.activations", "memory.recipes", "memory.breakdown", "memory.budget", "memory")

_PAGE = Path(__file__).with_suffix(".md")


def files(root: Path) -> dict[str, str]:
    """Name -> content: the page, and the formulas it loads."""
    reference = root / "reference"
    sources = {}
    for name in MODULES:
        path = reference / f"{name.replace('.', '/')}.py"
        sources[f"reference.{name}"] = path if path.exists() else reference / name.replace(".", "/") / "__init__.py"
    return {"calculator.md": _PAGE.read_text(encoding="utf-8"), "_extra/memory.js": translate(sources, "modules")}
