"""Minutes are computed from what is read, and stated where they are asked for."""

from nbformat import v4

from course import build, reading
from course.notebooks import tidy


def test_a_page_takes_its_words_and_formulas():
    text = "word " * 300 + "\n\n$$\na = b\n$$\n\n$$c$$ <!--claim x:y .0f--> ![" + "alt " * 500 + "](figure.png) [link](" + "a/" * 50 + ")"
    assert reading.seconds(text) == 60 * 301 / 150 + 2 * 20
    assert reading.refresh(f"*9<!--minutes--> minutes* {text}").startswith("*3<!--minutes--> minutes*")


def test_a_notebook_states_the_sum_and_each_section():
    picture = v4.new_output("display_data", {"image/png": "x"})
    cells = [
        v4.new_markdown_cell("# Squares\nTakes 99<!--minutes--> minutes."),
        v4.new_markdown_cell("## 1 · One · 0<!--minutes--> min\n" + "word " * 290),
        v4.new_code_cell("x = 1\n\ny = 2"),
        v4.new_markdown_cell("## 2 · Two · 0<!--minutes--> min"),
        v4.new_code_cell("raise NotImplementedError()", metadata={"tags": [reading.WRITE]}),
        v4.new_code_cell("plot()\n" * 40, outputs=[picture], metadata={"tags": [reading.HIDDEN]}),
    ]
    notebook = reading.refresh_notebook(v4.new_notebook(cells=cells))
    assert [cell.source.partition("\n")[0] for cell in notebook.cells if cell.cell_type == "markdown"] == [
        "# Squares",
        "## 1 · One · 3<!--minutes--> min",
        "## 2 · Two · 4<!--minutes--> min",
    ]
    assert "Takes 6<!--minutes--> minutes" in notebook.cells[0].source


def test_a_folded_cell_stays_folded_in_jupyter():
    cell = v4.new_code_cell("a_plot = 3", metadata={"tags": [reading.HIDDEN]}, outputs=[v4.new_output("stream", text="drawn\n")])
    notebook = tidy(v4.new_notebook(cells=[cell, v4.new_code_cell("seen = 4")]))
    assert notebook.cells[0].metadata["jupyter"] == {"source_hidden": True} and "jupyter" not in notebook.cells[1].metadata


def test_build_brings_minutes_up_to_date(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("*70<!--minutes--> minutes* " + "word " * 140)
    (derived,) = build.pages([page])
    assert not derived.fresh and derived.right.startswith("*1<!--minutes--> minutes*")
