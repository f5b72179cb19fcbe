"""The sources of the site: which pages there are, in which order, and what each is made of."""

import html
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nbformat import NotebookNode, v4

from course.interview import Question
from course.notebooks import as_text, read
from course.units import CourseError, Unit, units
from course.website import api, calculator, questions, recorded
from course.website.cells import page_notebook
from course.website.texts import Links

EXTRA = "_extra"  # files under it go to the site as they are


@dataclass
class Sources:
    """A folder of sources in which only what differs is written, so that Sphinx reads only that again."""

    folder: Path
    written: set[Path] = field(default_factory=set)

    def put(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        content = content.encode() if isinstance(content, str) else content
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.written.add(path)

    def forget_others(self) -> None:
        """Remove what an earlier build put and this one did not."""
        for path in [path for path in self.folder.rglob("*") if path.is_file() and path not in self.written]:
            path.unlink()


def parts(unit: Unit) -> dict[Path, str]:
    """File -> name of its page, in the order in which one reads them; the first stands for the unit."""
    found = {unit.lesson: "Lesson", unit.notebook: "Notebook", unit.exercise: "Exercises", unit.interview: "Interview questions"}
    for path in sorted(unit.appendices, key=lambda path: path.stem != unit.stem):
        found[path] = "Appendix" if path.stem == unit.stem else f"Appendix: {path.stem[3:].replace('_', ' ')}"
    return {path: name for path, name in (found | {unit.solution: "Worked answers"}).items() if path.exists()}


def repository(root: Path) -> str:
    """The address of the course's repository, the one setting behind all links to it: ``[project.urls] repository`` of pyproject.toml."""
    path = root / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}) if path.exists() else {}
    return project.get("urls", {}).get("repository", "").removesuffix("/").removesuffix(".git")


def source_of(path: Path, root: Path) -> str:
    """The name of the page's source that is made of the file ``path``."""
    suffix = {".yaml": ".md", ".json": ".md"}.get(path.suffix, path.suffix)
    return path.relative_to(root).with_suffix(suffix).as_posix()


def links(root: Path) -> Links:
    """Where each file of the course is found on the site."""
    pages = {path: source_of(path, root) for unit in units(root) for path in parts(unit)}
    for path, page in list(pages.items()):
        pages.setdefault(path.parent, page)  # a link to a folder leads to its first page
    pages |= {path: path.name for path in root.glob("*.md")} | {root / "README.md": "index.md"}
    if (root / "reference").is_dir():
        pages |= api.targets(root)
    benchmarks = root / "benchmarks"
    for path in (benchmarks / "recorded").glob("*/*.json"):
        pages[path] = pages[benchmarks / f"{path.stem}.py"] = f"benchmarks/{path.stem}.md"
        pages[path.parent] = pages[benchmarks / "recorded"] = pages[benchmarks] = "benchmarks/index.md"
    return Links(root, pages, repository(root))


@dataclass
class Layout:
    """Puts the sources of all pages.

    Attributes:
        executed: notebooks that have just run, shown in place of the committed ones.
        memory: a folder to keep what takes long to compute.
        unreadable: what is to be said of files that could not be read.
    """

    root: Path
    sources: Sources
    executed: dict[Path, NotebookNode]
    memory: Path
    before_page: Callable[[Path], None]
    unreadable: list[str] = field(default_factory=list)

    def put(self, summary: dict[str, str], slides: bool) -> None:
        """All of them.

        Args:
            summary: unit number -> what to say of its run on the first page.
            slides: there are slides beside the pages, under ``slides/``.
        """
        self.links = links(self.root)
        self.questions: dict[Unit, tuple[Question, ...]] = {}
        found = [unit for unit in units(self.root) if parts(unit)]
        for unit in found:
            self._put_unit(unit)
        trees = [("Units", [source_of(next(iter(parts(unit))), self.root) for unit in found]), ("More", self._put_others())]
        readme = self.root / "README.md"
        text = self.links.page_text(readme.read_text(encoding="utf-8"), readme) if readme.exists() else "# The course\n"
        title, _, rest = text.partition("\n")
        text = f"{title}\n\n{_this_run(found, summary)}\n\n{rest}" if summary else text
        text += '\n\n<p><a href="slides/index.html">Slides of every unit</a></p>\n' * slides
        self.sources.put("index.md", text + "".join(_tree(pages, name) for name, pages in trees if pages))
        for path in self.links.pictures:
            self.sources.put(path.relative_to(self.root).as_posix(), path.read_bytes())
        self.sources.forget_others()

    def _put_unit(self, unit: Unit) -> None:
        own = parts(unit)
        top = next(iter(own))
        for path in own:
            self.before_page(path)
            try:
                page = self._page(path, unit)
            except CourseError as error:
                self.unreadable.append(str(error))
                said = f"# {unit.number} · {unit.title}\n\n{html.escape(str(error))}"
                page = v4.new_notebook(cells=[v4.new_markdown_cell(said)]) if path.suffix == ".ipynb" else said
            extra = ""
            if path == unit.lesson and unit.interview in own:
                extra += f"\n\n*Asked in interviews: [questions of this unit](interview/{unit.stem}.md).*\n"
            if path == top and len(own) > 1:
                extra += _tree([f"{name} </{source_of(each, self.root).rpartition('.')[0]}>" for each, name in own.items() if each != top])
            if isinstance(page, str):
                page += extra
            else:
                page.cells += [v4.new_markdown_cell(extra, id="pages")] if extra else []
                page = as_text(page)
            self.sources.put(source_of(path, self.root), page)

    def _page(self, path: Path, unit: Unit) -> str | NotebookNode:
        """The source of the page of ``path``, as Markdown or as a notebook."""
        if path.suffix == ".ipynb":
            return page_notebook(self.executed.get(path) or read(path), path, self.links, self.sources.put)
        if path == unit.interview:
            self.questions[unit] = questions.of(unit, self.memory)
            return questions.page(unit, self.questions[unit], self.links)
        try:
            return self.links.page_text(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise CourseError(f"{path} can't be read: {error}") from error

    def _put_others(self) -> list[str]:
        """The pages that belong to no unit; returns those that the first page leads to."""
        tops = []
        if self.questions:
            self.sources.put("questions.md", questions.overview(self.questions))
            tops.append("questions")
        if (self.root / "reference" / "memory").is_dir():
            for name, text in calculator.files(self.root).items():
                self.sources.put(name, text)
            tops.append("calculator")
        if measured := recorded.pages(self.root):
            for name, text in measured.items():
                self.sources.put(f"benchmarks/{name}.md", text)
            for path in (self.root / "benchmarks" / "recorded").glob("*/*.json"):
                self.sources.put(f"{EXTRA}/{path.relative_to(self.root).as_posix()}", path.read_bytes())
            tops.append("benchmarks/index")
        if (self.root / "reference").is_dir():
            self.sources.put("reference/index.md", api.index(self.root))
            for name, paths in api.modules(self.root).items():
                self.sources.put(f"reference/{name}.md", api.page(name, paths, self.root))
            tops.append("reference/index")
        for path in sorted(self.root.glob("*.md")):
            if path.name != "README.md":
                self.sources.put(path.name, self.links.page_text(path.read_text(encoding="utf-8"), path))
                tops.append(path.stem)
        return tops


def _tree(pages: list[str], caption: str = "") -> str:
    """What tells Sphinx the order of ``pages`` below this one."""
    return "\n\n```{toctree}\n:hidden:\n" + f":caption: {caption}\n" * bool(caption) + "\n" + "\n".join(pages) + "\n```\n"


def _this_run(found: list[Unit], summary: dict[str, str]) -> str:
    rows = [
        f"| [{unit.number} {unit.title}](notebooks/{unit.stem}.ipynb) | {summary[unit.number]} |"
        for unit in found
        if unit.number in summary
    ]
    return "\n".join(["## This run", "", "| notebook | result |", "|---|---|", *rows])
