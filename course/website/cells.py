"""Notebooks as pages show them."""

import base64
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import nbformat
from nbformat import NotebookNode, v4

from course.notebooks import is_answer
from course.reading import HIDDEN
from course.website.texts import Links, escape

_WIDGET = "application/vnd.jupyter.widget-view+json"
_SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/svg+xml": ".svg"}
_ATTACHED = re.compile(r"!\[(?P<alt>[^\]]*)\]\(attachment:(?P<name>[^)\s]+)[^)]*\)")
_MARKS = re.compile(r"^[ \t]*### (?:BEGIN|END) SOLUTION\n?", re.MULTILINE)
_TITLE = re.compile(r"\A# .*")
_KINDS = {"notebooks": "notebook", "solutions": "worked answers"}  # whose titles are those of the lesson and of the exercises
CONTROL = '<p class="control">A control that moves: open the notebook in Jupyter.</p>'


def page_notebook(notebook: NotebookNode, source: Path, links: Links, save: Callable[[str, bytes], None]) -> NotebookNode:
    """The notebook of the file ``source`` as its page has it; the one given stays as it is.

    Pictures, in outputs or pasted into a cell, become files beside the page, shown with their alt texts; sliders become a note that they
    live in Jupyter; of a notebook with solutions the answers and their discussions are folded.

    Args:
        save: is given each picture's name, relative to the site's sources, and its content.
    """
    shown = nbformat.from_dict(notebook)
    shown.metadata.pop("widgets", None)  # their state, which only scripts could show
    folder = PurePosixPath(source.relative_to(links.root).with_suffix(".files").as_posix())

    def picture(name: str, mime: str, content: str, alt: str) -> str:
        save(f"{folder}/{name}{_SUFFIXES[mime]}", content.encode() if mime == "image/svg+xml" else base64.b64decode(content))
        return f"![{escape(alt)}]({folder.name}/{name}{_SUFFIXES[mime]})"

    if kind := _KINDS.get(source.parent.name):
        for cell in shown.cells[:1]:
            cell.source = _TITLE.sub(rf"\g<0> · {kind}", cell.source)
    for index, cell in enumerate(shown.cells):
        if cell.cell_type == "code":
            cell.outputs = [_output(output, f"{index}-{place}", picture) for place, output in enumerate(cell.get("outputs", []))]
        elif cell.cell_type == "markdown":
            cell.source = _pasted(cell, index, picture)
            cell.source = links.page_text(cell.source, source)
            if "solution-only" in cell.metadata.get("tags", []):
                cell.source = f"<details><summary>Discussion</summary>\n\n{cell.source}\n\n</details>"
        if source.parent.name == "solutions" and is_answer(cell):
            cell.source = _MARKS.sub("", cell.source)
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), HIDDEN]
            cell.metadata["mystnb"] = {"code_prompt_show": "Show a worked answer", "code_prompt_hide": "Hide the answer"}
    return shown


def _output(output: NotebookNode, name: str, picture: Callable[[str, str, str, str], str]) -> NotebookNode:
    data = output.get("data", {})
    if _WIDGET in data:
        return v4.new_output("display_data", {"text/markdown": CONTROL})
    if mime := next((mime for mime in _SUFFIXES if mime in data), None):
        alt = output.metadata.get(mime, {}).get("alt") or "No description was given for this picture."
        return v4.new_output("display_data", {"text/markdown": picture(name, mime, data[mime], alt)})
    return output


def _pasted(cell: NotebookNode, index: int, picture: Callable[[str, str, str, str], str]) -> str:
    """The cell's text with the pictures that were pasted into it."""

    def put(match: re.Match) -> str:
        kept = cell.get("attachments", {}).get(match["name"], {})
        if mime := next((mime for mime in _SUFFIXES if mime in kept), None):
            return picture(f"{index}-{Path(match['name']).stem}", mime, kept[mime], match["alt"])
        # pasted into another notebook, from which only the text was copied
        return f"*(A picture that this notebook does not hold: {match['alt'] or match['name']}.)*"

    return _ATTACHED.sub(put, cell.source)
