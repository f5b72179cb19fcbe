"""Pages of ``reference/``, read from the files without importing them: what each module says of itself, its public names, its code.

Docstrings are in the manner of torchtune: paragraphs, formulas set off by an indent, ``Args:`` and its like. They are plain text with
marks for code, so they become HTML here and pass no Markdown that would take a * for emphasis or an indent for a quotation.
"""

import ast
import html
import re
from pathlib import Path

from course.website.texts import raw

_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Yields|Raises):$")
_ITEM = re.compile(r"^(?P<name>[*\w`.]+(?:, [*\w`.]+)*):\s+(?P<rest>.*)$", re.DOTALL)
_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_SPAN = re.compile(r"``(.+?)``|`([^`]+)`")


def modules(root: Path) -> dict[str, list[Path]]:
    """Name under ``reference`` -> its files; of a folder ``__init__`` first, which names the file to begin with."""
    found = {}
    for path in sorted((root / "reference").iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            found[path.stem] = [path]
        elif (path / "__init__.py").exists():
            found[path.name] = [path / "__init__.py", *_in_order(path)]
    return found


def _in_order(folder: Path) -> list[Path]:
    """The files of a package: the one where its ``__init__`` says to begin comes first."""
    begin = re.search(r"[Bb]egin at :mod:`[\w.]+\.(\w+)`", (folder / "__init__.py").read_text(encoding="utf-8"))
    paths = sorted(path for path in folder.rglob("*.py") if path != folder / "__init__.py" and path.read_text(encoding="utf-8").strip())
    return sorted(paths, key=lambda path: path.stem != (begin and begin[1]))


def targets(root: Path) -> dict[Path, str]:
    """File or folder of ``reference`` -> its page, and the heading on it."""
    found = {root / "reference": "reference/index.md", root / "reference" / "__init__.py": "reference/index.md"}
    for name, paths in modules(root).items():
        found[root / "reference" / name] = f"reference/{name}.md"
        for path in paths:
            own = path.parent == root / "reference" or path.stem == "__init__"
            found[path] = f"reference/{name}.md" + ("" if own else f"#{_slug(_module(path, root))}")
    return found


def _module(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def index(root: Path) -> str:
    """The page of the package itself: what it says, and each module in a line."""
    rows = []
    for name, paths in modules(root).items():
        said = (ast.get_docstring(_tree(paths[0])) or "").partition("\n\n")[0]
        rows.append(f'<li><a href="{name}.html">{name}</a>: {_inline(said)}</li>')
    entries = "\n".join(f"{name} <{name}>" for name in modules(root))
    parts = ["# Reference modules", _block(_tree(root / "reference" / "__init__.py")), raw(f'<ul class="docstring">{"".join(rows)}</ul>')]
    return "\n\n".join([*parts, f"```{{toctree}}\n:hidden:\n\n{entries}\n```\n"])


def page(name: str, paths: list[Path], root: Path) -> str:
    """The page of one module, or of a package with its files one after the other."""
    parts = [f"# reference.{name}"]
    for path in paths:
        tree, single = _tree(path), len(paths) == 1
        if not single and path.stem != "__init__":
            parts.append(f"## {_module(path, root)}")
        parts.append(_block(tree))
        level = "##" if single else "###"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                parts += _described(node, level)
        if path.stem != "__init__":
            source = path.read_text(encoding="utf-8").rstrip()
            parts += [f"<details><summary>The code of {_module(path, root)}</summary>", f"````python\n{source}\n````", "</details>"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _described(node: ast.FunctionDef | ast.ClassDef, level: str) -> list[str]:
    """Heading, signature and docstring; of a class its public methods too."""
    parts = [f"{level} {node.name}", f"```python\n{_signature(node)}\n```", _block(node)]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                parts += [f"```python\n{_signature(method)}\n```", _block(method, "method")]
    return parts


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """As it stands in the file, without its body; a dataclass with its fields, another class with how it is made."""
    decorators = "".join(f"@{ast.unparse(each)}\n" for each in node.decorator_list)
    if isinstance(node, ast.FunctionDef):
        line = f"def {node.name}({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
        if len(line) <= 88:
            return decorators + line
        arguments = ast.arguments(**{field: getattr(node.args, field) for field in ast.arguments._fields})
        inside = ",\n    ".join(_split(ast.unparse(arguments)))
        return f"{decorators}def {node.name}(\n    {inside},\n)" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    bases = ", ".join(map(ast.unparse, node.bases))
    lines = [f"{decorators}class {node.name}{f'({bases})' if bases else ''}"]
    lines += [f"    {ast.unparse(each)}" for each in node.body if isinstance(each, ast.AnnAssign)]
    made = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if made:
        lines += [f"    {line}" for line in _signature(made).splitlines()]
    return "\n".join(lines)


def _split(arguments: str) -> list[str]:
    """At the commas that are in no bracket."""
    pieces, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def docstring(node: ast.AST) -> str:
    """The docstring of ``node`` as HTML; empty if it has none."""
    text = ast.get_docstring(node) or ""
    done, lines = [], text.split("\n")
    while lines:
        if match := _SECTION.match(lines[0]):
            body = _take(lines, 1, lambda line: not line or line.startswith(" "))
            done.append(f'<p class="section">{match[1]}</p>\n{_items(body)}')
        elif lines[0].startswith("    "):
            block = _take(lines, 0, lambda line: not line or line.startswith("    "))
            inside = "\n".join(line[4:] for line in block).strip("\n")
            done.append(f'<pre class="formula" tabindex="0">{html.escape(inside)}</pre>')
        elif not lines[0]:
            del lines[0]
        else:
            done.append(f"<p>{_inline(' '.join(_take(lines, 0, lambda line: line and not line.startswith('    '))))}</p>")
    return "\n".join(done)


def _take(lines: list[str], skip: int, holds) -> list[str]:
    """Remove ``skip`` lines and those after them for which ``holds``; returns the latter."""
    del lines[:skip]
    taken = []
    while lines and holds(lines[0]) and not _SECTION.match(lines[0]):
        taken.append(lines.pop(0))
    return taken


def _items(lines: list[str]) -> str:
    """The entries of a section such as Args, each a name and what is said of it."""
    entries: list[str] = []
    for line in lines:
        if line.startswith("    ") and not line.startswith("     "):
            starts = _ITEM.match(line.strip()) or not entries
            entries.append(line.strip()) if starts else entries.append(entries.pop() + " " + line.strip())
        elif line.strip() and entries:
            entries[-1] += " " + line.strip()
    parts = []
    for entry in entries:
        match = _ITEM.match(entry)
        name = f'<dl class="section"><dt><code>{html.escape(match["name"])}</code></dt>' if match else ""
        parts.append(f"{name}<dd>{_inline(match['rest'])}</dd></dl>" if match else f'<p class="said">{_inline(entry)}</p>')
    return "".join(parts).replace('</dl><dl class="section">', "")


def _inline(text: str) -> str:
    text = _ROLE.sub(r"``\1``", html.escape(text, quote=False))
    text = _SPAN.sub(lambda match: f"<code>{match[1] or match[2]}</code>", text)
    return re.sub(r"(?<![\w*])\*(\w[^*]*?\w|\w)\*(?![\w*])", r"<em>\1</em>", text)


def _block(node: ast.AST, kind: str = "") -> str:
    """The docstring of ``node`` inside Markdown; empty if it has none."""
    body = docstring(node)
    return raw(f'<div class="docstring {kind}">\n{body}\n</div>') if body else ""
