"""A course of two small units in a folder, without torch, so that the machinery can be tested in seconds."""

from pathlib import Path

from nbformat import NotebookNode, v4

from course.notebooks import as_text, tidy
from course.units import Unit, find

CHECKS = '''\
class NotYet(AssertionError):
    pass


class Check:
    """The two halves of a check, as course.checking has them."""

    rounds = 2

    def __init__(self, expected):
        self.expected = expected

    def __call__(self, answer):
        self.verdict(self.witness(answer, 0), 0)
        print("right")

    def witness(self, answer, seed):
        try:
            return answer(3)
        except NotImplementedError:
            raise NotYet("nothing here yet") from None

    def verdict(self, plain, seed):
        if plain != self.expected:
            raise NotYet(f"expected {self.expected}, got {plain}")


square, double = Check(9), Check(6)
'''

SETUP = "from course.checks import squares as check"

SQUARE = """\
def square(x):
    ### BEGIN SOLUTION
    return x * x
    ### END SOLUTION"""

DOUBLE = """\
def double(x):
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION"""

LESSON = r"""# Squares

The square is $x^2 = x \cdot x$; run [the notebook](../notebooks/00_squares.ipynb), see [cubes](01_cubes.md#the-cube).

$$
\begin{aligned} a &= b \\ c &= d \end{aligned}
$$

| a | b |
|---|---|
| `1` | **2** <!--claim x:y .0f--> |

![a dot](dot.png)
"""

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def nbgrader_cell(cell: NotebookNode, grade_id: str, *, solution=False, points: int | None = None) -> NotebookNode:
    """Mark a code cell for nbgrader: an answer, a check with points, or a locked cell."""
    cell.metadata["nbgrader"] = {
        "grade": points is not None,
        "grade_id": grade_id,
        "locked": not solution,
        "schema_version": 3,
        "solution": solution,
        "task": False,
        "cell_type": "code",
    }
    if points is not None:
        cell.metadata["nbgrader"]["points"] = points
    return cell


def solution() -> NotebookNode:
    """Two exercises, of 1 and 2 points, with a locked cell and a discussion."""
    discussion = v4.new_markdown_cell("Discussion: a square is a product.")
    discussion.metadata["tags"] = ["solution-only"]
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# Squares"),
            nbgrader_cell(v4.new_code_cell(SETUP), "setup"),
            v4.new_markdown_cell("## 1. Square\n**●○○○○ · 2 minutes · asked rarely**"),
            nbgrader_cell(v4.new_code_cell(SQUARE), "square", solution=True),
            nbgrader_cell(v4.new_code_cell("check.square(square)"), "check-square", points=1),
            discussion,
            v4.new_markdown_cell("## 2. Double"),
            nbgrader_cell(v4.new_code_cell(DOUBLE), "double", solution=True),
            nbgrader_cell(v4.new_code_cell("check.double(double)"), "check-double", points=2),
            v4.new_markdown_cell("The end."),
        ],
        metadata={"kernelspec": {"display_name": "x", "language": "python", "name": "python3"}, "jupytext": {"formats": "py"}},
    )


def notebook() -> NotebookNode:
    picture = v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "a dot"}, metadata={"image/png": {"alt": "one grey dot"}})
    caption = v4.new_output("display_data", {"text/markdown": "*A dot.*", "text/plain": "A dot."})
    shown = v4.new_code_cell("print('drawn')", outputs=[v4.new_output("stream", text="drawn\n"), picture, caption], execution_count=2)
    return v4.new_notebook(cells=[v4.new_markdown_cell("# Squares\nWhat is $x^2$?"), v4.new_code_cell("x = 3"), shown])


def save(notebook: NotebookNode, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(tidy(notebook)), encoding="utf-8")
    return path


def make(root: Path) -> Unit:
    """Write the course into ``root``; returns its first unit. The second one has only a lesson."""
    save(solution(), root / "solutions" / "00_squares.ipynb")
    save(notebook(), root / "notebooks" / "00_squares.ipynb")
    checks = root / "course" / "checks" / "squares" / "__init__.py"
    checks.parent.mkdir(parents=True)
    checks.write_text(CHECKS, encoding="utf-8")
    lessons = root / "lessons"
    lessons.mkdir()
    (lessons / "00_squares.md").write_text(LESSON)
    (lessons / "dot.png").write_bytes(b"png")
    (lessons / "01_cubes.md").write_text("# Cubes\n\n## The cube\n\nNothing yet.\n")
    (lessons / "appendix").mkdir()
    (lessons / "appendix" / "00_more.md").write_text("# More\n\nBack to [squares](../00_squares.md).\n")
    (root / "README.md").write_text("# The small course\n\nStart with [squares](lessons/00_squares.md).\n")
    return find("squares", root)
