"""The course as pages: lessons, notebooks and exercises as plain HTML that needs no network.

Notebooks go through nbconvert's "basic" template, which brings no scripts. Formulas become MathML, which browsers draw by themselves, so a
page reads the same on a plane; links between the course's files lead to the pages made of them.
"""

import html
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import latex2mathml.converter
import nbformat
from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import TagRemovePreprocessor
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from course import ROOT
from course.notebooks import read
from course.reading import HIDDEN
from course.units import CourseError, Unit, units

FOLDER = ROOT / "site"
_STYLE = (Path(__file__).parent / "site.css").read_text(encoding="utf-8")
_LINK = re.compile(r'(?P<head><(?:a|img)\b[^>]*?\b(?:href|src)=")(?P<target>[^"#:]+)(?P<rest>(?:#[^"]*)?")')
_WIDGET = "application/vnd.jupyter.widget-view+json"
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def mathml(tex: str, display: str = "inline") -> str:
    """``tex`` as MathML; as it stands, in a code element, where the converter doesn't know it."""
    # the converter knows the starred environments only
    known = re.sub(r"\\(begin|end)\{(?:aligned|align|gather|gathered|equation)\}", r"\\\1{align*}", tex)
    try:
        converted = latex2mathml.converter.convert(html.unescape(known), display=display)
    except Exception:  # it raises a dozen kinds
        converted = ""
    if not converted or "<mi>\\" in converted or "<mi>&</mi>" in converted:
        return f'<code class="tex">{html.escape(tex)}</code>'
    return converted


class _Renderer(IPythonRenderer):
    """nbconvert's, with formulas as MathML and headings named as GitHub names them, so that links work in both places."""

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    multiline_math = block_math

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def heading(self, text: str, level: int, **attributes) -> str:
        words = re.sub(r"[^\w\- ]", "", re.sub(r"<[^>]+>", "", html.unescape(text)).lower())
        return f'<h{level} id="{words.replace(" ", "-")}">{text}</h{level}>\n'


def markdown(text: str) -> str:
    """GitHub-flavoured Markdown with formulas, as HTML."""
    return MarkdownWithMath(_Renderer(escape=False)).render(_COMMENT.sub("", text))


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source: str) -> str:
        return markdown(source)


def notebook_body(notebook: NotebookNode) -> str:
    """The notebook's cells and outputs as HTML; alt texts stay, sliders become a note that they live in Jupyter."""
    shown = nbformat.from_dict(notebook)
    shown.metadata.pop("widgets", None)  # their state, which only scripts could show
    for cell in shown.cells:
        for output in cell.get("outputs", []):
            if _WIDGET in output.get("data", {}):
                output["data"] = {"text/html": '<p class="widget">A control that moves: open the notebook in Jupyter.</p>'}
    exporter = _Exporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={HIDDEN}, enabled=True), enabled=True)
    exporter.register_filter("highlight_code", Highlight2HTML(pygments_lexer="ipython3", parent=exporter))
    body, _ = exporter.from_notebook_node(shown)
    return body


def _page(title: str, body: str, links: dict[str, str]) -> str:
    navigation = "".join(f'<a href="{html.escape(target)}">{html.escape(name)}</a>' for name, target in links.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}{_code_style()}\n</style>\n</head>\n<body>\n"
        f"<nav>{navigation}</nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _code_style() -> str:
    return HtmlFormatter(style="friendly").get_style_defs(".highlight")


def _relink(body: str, source: Path, root: Path, folder: Path, made: dict[Path, Path]) -> str:
    """Point relative links to the pages ``made`` of their targets; pictures are copied; other files are linked where they lie."""
    page = made[source]

    def put(match: re.Match) -> str:
        target = (source.parent / match["target"]).resolve()
        if target in made:
            goal = made[target]
        elif match["head"].startswith("<img") and target.is_file() and target.is_relative_to(root):
            goal = folder / target.relative_to(root)
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, goal)
        elif target.exists():
            goal = target
        else:
            return match[0]
        return match["head"] + Path(os.path.relpath(goal, page.parent)).as_posix() + match["rest"]

    return _LINK.sub(put, body)


def write(
    root: Path = ROOT,
    folder: Path | None = None,
    executed: dict[Path, NotebookNode] | None = None,
    summary: dict[str, str] | None = None,
    before_page: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Write the pages of all units and an index; returns the index. A file that can't be read gets a page that says so.

    Args:
        folder: where to; ``root/site`` if None.
        executed: notebooks that have just run, shown in place of the committed ones.
        summary: unit number -> what to say of its run in the index.
        before_page: called with each source file before its page is made.

    Raises:
        CourseError: files could not be read; raised when everything else is written.
    """
    root = root.resolve()
    folder = (folder or root / "site").resolve()
    found = units(root)
    sources = [path for unit in found for path in (unit.lesson, unit.appendix, unit.notebook, unit.exercise) if path.exists()]
    made = {path: folder / path.relative_to(root).with_suffix(".html") for path in sources}
    readme = root / "README.md"
    if readme.exists():
        made[readme] = folder / "index.html"
    unreadable = []
    for path in sources:
        before_page(path)
        try:
            body = _body(path, (executed or {}).get(path))
        except CourseError as error:
            unreadable.append(str(error))
            body = f"<p>{html.escape(str(error))}</p>"
        unit = next(unit for unit in found if path.stem == unit.stem)
        body = _relink(body, path, root, folder, made)
        made[path].parent.mkdir(parents=True, exist_ok=True)
        made[path].write_text(_page(f"{unit.number} {unit.title}", body, _links(unit, found, made, made[path], folder)), encoding="utf-8")
    index = folder / "index.html"
    overview = f"<h2>{'This run' if summary else 'All pages'}</h2>\n{_overview(found, made, folder, summary or {})}"
    welcome = _relink(markdown(readme.read_text(encoding="utf-8")), readme, root, folder, made) if readme.exists() else ""
    folder.mkdir(parents=True, exist_ok=True)
    index.write_text(_page("The course", overview + welcome if summary else welcome + overview, {}), encoding="utf-8")
    if unreadable:
        raise CourseError("; ".join(unreadable) + f". All other pages are written: {index}")
    return index


def _body(path: Path, executed: NotebookNode | None) -> str:
    """What a page shows of the lesson or notebook ``path``, or of the notebook as it was ``executed``."""
    if path.suffix != ".md":
        return notebook_body(executed or read(path))
    try:
        return markdown(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CourseError(f"{path} can't be read: {error}") from error


def _links(unit: Unit, found: list[Unit], made: dict[Path, Path], page: Path, folder: Path) -> dict[str, str]:
    def relative(goal: Path) -> str:
        return Path(os.path.relpath(goal, page.parent)).as_posix()

    links = {"Course": relative(folder / "index.html")}
    for name, path in {"Lesson": unit.lesson, "Appendix": unit.appendix, "Notebook": unit.notebook, "Exercises": unit.exercise}.items():
        if path in made:
            links[f"{unit.number} {name.lower()}"] = relative(made[path])
    position = found.index(unit)
    kind = page.parent.name
    for arrow, other in (("←", found[position - 1] if position else None), ("→", next(iter(found[position + 1 :]), None))):
        if other is not None:
            goal = next(
                (made[path] for path in (other.lesson, other.notebook, other.exercise) if path in made and path.parent.name == kind), None
            )
            if goal is not None:
                links[f"{arrow} {other.number} {other.title}"] = relative(goal)
    return links


def _overview(found: list[Unit], made: dict[Path, Path], folder: Path, summary: dict[str, str]) -> str:
    def cell(path: Path, text: str) -> str:
        link = Path(os.path.relpath(made[path], folder)).as_posix() if path in made else None
        return f'<td><a href="{link}">{text}</a></td>' if link else "<td></td>"

    heads = ["unit", "to read", "to run", "to do"] + ["this run"] * bool(summary)
    rows = [
        f"<tr><td>{unit.number} {html.escape(unit.title)}</td>"
        + cell(unit.lesson, "lesson")
        + cell(unit.notebook, "notebook")
        + cell(unit.exercise, "exercises")
        + f"<td>{html.escape(summary.get(unit.number, ''))}</td>" * bool(summary)
        + "</tr>"
        for unit in found
    ]
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<table class="units"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>\n'
