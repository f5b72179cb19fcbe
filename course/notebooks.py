"""Read notebooks with errors that a person can act on, and write them so that only real changes make a difference."""

import re
import warnings
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course.reading import HIDDEN
from course.units import CourseError

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
_BAR = re.compile(r"\[(\d+:)?\d\d:\d\d.*\]$")  # how tqdm ends its bars: 0/3 [00:00<?, ?it/s]


def read(path: Path) -> NotebookNode:
    """The notebook in ``path``, in nbformat 4.5.

    Raises:
        CourseError: there is no such file, or it is not a notebook.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CourseError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CourseError(f"{path} can't be read: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing and repeated cell ids, which normalize mends
            notebook = nbformat.reads(text, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type != "code":  # a cell that once was code; Jupyter opens it too
                    for name in ("outputs", "execution_count"):
                        cell.pop(name, None)
            _, notebook = nbformat.validator.normalize(notebook)
            nbformat.validate(notebook)
    except Exception as error:  # nbformat raises half a dozen kinds, KeyError and TypeError among them
        raise CourseError(f"{path} is not a notebook that Jupyter can read ({type(error).__name__})") from error
    return notebook


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Remove, in place, what differs between two equal runs or two machines, and progress bars, which a page would show as they began."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    for cell in notebook.cells:
        for name in ("execution", "collapsed", "scrolled", "jupyter", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if HIDDEN in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}  # folded in JupyterLab; one click shows it
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_bar(output)]
    return notebook


def _is_bar(output: NotebookNode) -> bool:
    data = output.get("data", {})
    return "application/vnd.jupyter.widget-view+json" in data and bool(_BAR.search(data.get("text/plain", "").strip()))


def as_text(notebook: NotebookNode) -> str:
    """The file's text: as nbformat writes it, with one newline at the end."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def marks(cell: NotebookNode) -> dict:
    """The cell's nbgrader metadata; empty if it has none, or something else under that name."""
    found = cell.metadata.get("nbgrader")
    return found if isinstance(found, dict) else {}


def is_check(cell: NotebookNode) -> bool:
    return bool(marks(cell).get("grade"))


def is_answer(cell: NotebookNode) -> bool:
    return bool(marks(cell).get("solution")) and not is_check(cell)


def title_above(notebook: NotebookNode, index: int) -> str | None:
    """The nearest heading above cell ``index``, without its marks."""
    for cell in reversed(notebook.cells[:index]):
        if cell.cell_type == "markdown":
            for line in reversed(cell.source.splitlines()):
                if line.startswith("#"):
                    return line.lstrip("#").strip()
    return None
