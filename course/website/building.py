"""One call from the course's files to its pages."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

from nbformat import NotebookNode

from course import ROOT
from course.units import CourseError
from course.website.pages import EXTRA, Layout, Sources, repository
from course.website.texts import BRANCH

WORK = ".work"  # inside the site: its sources, what Sphinx has read, and what it had to say


def write(
    root: Path = ROOT,
    folder: Path | None = None,
    executed: dict[Path, NotebookNode] | None = None,
    summary: dict[str, str] | None = None,
    before_page: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Write the pages of all units and what lies beside them; returns the first page. A file that can't be read gets a page that says so.

    Args:
        folder: where to; ``root/site`` if None. Pages that an earlier call wrote there and that are still right stay as they are.
        executed: notebooks that have just run, shown in place of the committed ones.
        summary: unit number -> what to say of its run on the first page.
        before_page: called with each file before its source or its page is made.

    Raises:
        CourseError: files could not be read; raised when everything else is written.
    """
    root = root.resolve()
    folder = (folder or root / "site").resolve()
    work, slides = folder / WORK, (folder / "slides" / "index.html").exists()
    layout = Layout(root, Sources(work / "source"), executed or {}, work / "questions", before_page)
    layout.put(summary or {}, slides)
    _build(root, folder, before_page)
    if layout.unreadable:
        raise CourseError("; ".join(layout.unreadable) + f". All other pages are written: {folder / 'index.html'}")
    return folder / "index.html"


def _build(root: Path, folder: Path, before_page: Callable[[Path], None]) -> None:
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    source, said = folder / WORK / "source", io.StringIO()
    address = repository(root)
    launch = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com", "notebook_interface": "jupyterlab"}
    settings = {
        "project": "Parameter-efficient fine-tuning, from nothing",
        "html_title": "PEFT, from nothing",
        "html_theme_options": {
            "repository_url": address,
            "repository_provider": "github",
            "repository_branch": BRANCH,
            "use_repository_button": bool(address),
            "launch_buttons": launch if address else {},
            "use_download_button": True,
            "use_fullscreen_button": False,
            "home_page_in_toc": False,
            "show_toc_level": 2,
            "navigation_with_keys": False,
            "navbar_persistent": [],
            "footer_content_items": [],
            "logo": {"text": "PEFT, from nothing"},
        },
    }
    here = Path(__file__).parent
    with patch_docutils(here), docutils_namespace():  # what Sphinx registers is forgotten again, for the next build
        app = Sphinx(source, here, folder, folder / WORK / "read", "html", confoverrides=settings, status=None, warning=said)
        outputs = str(folder / WORK / "outputs")  # as it comes they go beside the site, which is the repository's root
        app.env.mystnb_config = app.env.mystnb_config.copy(output_folder=outputs)
        app.connect("html-page-context", lambda app, page, *rest: before_page(Path(page)))
        app.build()
    (folder / WORK / "warnings.txt").write_text(said.getvalue(), encoding="utf-8")
    _tidy(app, root, folder)


def _tidy(app, root: Path, folder: Path) -> None:
    """Put what goes to the site as it is, notebooks to download among it, and remove pages that are no more."""
    shutil.copytree(app.srcdir / EXTRA, folder, dirs_exist_ok=True) if (app.srcdir / EXTRA).is_dir() else None
    for path in (folder / "_sources").rglob("*.ipynb"):
        original = root / path.relative_to(folder / "_sources")
        if original.exists():
            shutil.copyfile(original, path)
    pages = {folder / f"{name}.html" for name in (*app.env.found_docs, "search")}
    for path in [path for path in folder.rglob("*.html") if not path.is_relative_to(folder / WORK)]:
        if path not in pages and path.relative_to(folder).parts[0] not in ("slides", "_static"):
            path.unlink()
