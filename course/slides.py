"""``course slides``: the decks in ``slides/`` as reveal.js pages that need no network, in ``site/slides``.

A deck is a Markdown page: ``#`` is its title, each ``##`` a slide, and ``:::{revealjs-notes}`` what the speaker sees (key S). Its numbers
are claims, as in lessons. This module is the Sphinx extension too, which takes the claims' comments out.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from course import ROOT
from course.units import CourseError

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER, OUT = ROOT / "slides", ROOT / "site" / "slides"
MOST_SLIDES = 20
WIDTH, HEIGHT = 1280, 720
_INDEX = (
    '<!doctype html><meta charset="utf-8"><title>Slides</title><meta http-equiv="refresh" content="0; url={0}"><a href="{0}">Slides</a>\n'
)
_COMMENT = re.compile(r"\s*<!--.*?-->", re.DOTALL)
_SLIDE = re.compile(r"^##? ", re.MULTILINE)

_CONFIGURATION = {
    "project": "Parameter-efficient fine-tuning",
    "extensions": ["myst_parser", "sphinx_revealjs", "course.slides", "course.website.formulas"],
    "root_doc": "overview",
    "source_suffix": {".md": "markdown"},
    "myst_enable_extensions": ["dollarmath", "colon_fence"],
    "suppress_warnings": ["toc.not_included"],
    "html_math_renderer": "mathml",
    "revealjs_style_theme": "white",
    "revealjs_static_path": [str(Path(__file__).parent / "slides_static")],
    "revealjs_css_files": ["slides.css"],
    "revealjs_script_plugins": [{"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"}],
    "revealjs_script_conf": {
        "width": WIDTH,
        "height": HEIGHT,
        "margin": 0,
        "center": False,
        "hash": True,
        "slideNumber": "c/t",
        "transition": "none",
        "controls": False,
    },
}


def decks(folder: Path = FOLDER) -> list[Path]:
    """The overview first, then the units' in order."""
    return sorted(folder.glob("*.md"), key=lambda path: (path.stem != "overview", path.stem))


def count(text: str) -> int:
    """How many slides a deck has, with its title."""
    return len(_SLIDE.findall(text))


def build(folder: Path = FOLDER, out: Path = OUT) -> list[Path]:
    """Write the pages of all decks and return them.

    Raises:
        CourseError: Sphinx isn't installed, or warns: of a picture that is not there, a link that leads nowhere.
    """
    try:
        from sphinx.application import Sphinx
        from sphinx.util.docutils import docutils_namespace
    except ImportError:
        raise CourseError("slides need Sphinx: pip install -c constraints.txt -e '.[test]'") from None
    import io

    warnings = io.StringIO()
    with docutils_namespace():
        app = Sphinx(str(folder), None, str(out), str(out / ".doctrees"), "revealjs", _CONFIGURATION, status=None, warning=warnings)
        app.build()
    if words := re.sub(r"\x1b\[[0-9;]*m", "", warnings.getvalue()).strip():
        raise CourseError(f"the slides have mistakes:\n{words}")
    pages = [out / f"{deck.stem}.html" for deck in decks(folder)]
    (out / "index.html").write_text(_INDEX.format(pages[0].name), encoding="utf-8")  # which the site's first page links to
    return pages


def setup(app: "Sphinx") -> dict:
    """Called by Sphinx."""
    app.connect("source-read", _without_comments)
    return {"version": "1", "parallel_read_safe": True}


def _without_comments(app: "Sphinx", name: str, source: list[str]) -> None:
    source[0] = re.sub(r"(?<=\d) %", "\u00a0%", _COMMENT.sub("", source[0]))
