"""The pages of a small course: formulas without a network, alt texts, links between files, what is folded, what a run shows."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import miniature
import pytest
from nbformat import v4

from course import ROOT, build, website
from course.notebooks import as_text, read
from course.reading import HIDDEN
from course.units import CourseError, Unit
from course.website.api import docstring
from course.website.cells import page_notebook
from course.website.javascript import translate
from course.website.recorded import pages as recorded_pages
from course.website.texts import Links, outside_code, with_units


class Page(HTMLParser):
    """What a reader gets: links, pictures and scripts of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.images, self.loads, self.path = [], [], [], path
        self.text = path.read_text()
        self.article = self.text.partition("<article")[2].partition("</article>")[0]
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a":
            self.links.append(attributes.get("href", ""))
        if tag == "img":
            self.images.append(attributes)
        if tag in ("script", "link", "iframe", "img"):
            self.loads.append(attributes.get("src") or attributes.get("href") or "")


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Unit:
    unit = miniature.make(tmp_path_factory.mktemp("course"))
    build.write(build.exercises(unit.root))
    unit.interview.parent.mkdir()
    unit.interview.write_text(QUESTIONS)
    return unit


QUESTIONS = """\
- id: squares-why
  question: Why is $x^2$ a square?
  difficulty: 2
  minutes: 3
  unit: "00"
  sources: []
  kind: derivation
  frequency: often
  role: [research, applied]
  short: Because it is $x \\cdot x$.
  deep: See [the lesson](../00_squares.md).
  follow_ups: ["And of $-x$? (The same.)"]
  wrong: {answer: It is $2x$., why: That is double.}
  claims: {}
"""


@pytest.fixture(scope="module")
def pages(course: Unit) -> dict[str, Page]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("course.interview.FOLDER", course.interview.parent)
        patch.setattr("course.interview.questions", website_questions(course))
        index = website.write(course.root)
    assert (index.parent / ".work" / "warnings.txt").read_text() == ""
    assert not (course.root / "jupyter_execute").exists(), "outputs lie beside the site"
    return {str(path.relative_to(index.parent)): Page(path) for path in sorted(index.parent.rglob("*.html")) if "_static" not in path.parts}


def website_questions(course: Unit):
    import yaml

    from course import interview

    return lambda unit: tuple(interview._read(entry, "squares") for entry in yaml.safe_load(course.interview.read_text()))


def test_there_is_a_page_for_every_part_and_an_index(pages):
    assert set(pages) - {"search.html"} == {
        "index.html",
        "lessons/00_squares.html",
        "lessons/01_cubes.html",
        "lessons/appendix/00_more.html",
        "lessons/interview/00_squares.html",
        "notebooks/00_squares.html",
        "exercises/00_squares.html",
        "solutions/00_squares.html",
        "questions.html",
    }


def test_no_page_needs_the_network(pages):
    for page in pages.values():
        assert [load for load in page.loads if re.match(r"(?:https?:)?//", load)] == []


def test_links_to_notebooks_and_lessons_lead_to_their_pages(pages):
    lesson = pages["lessons/00_squares.html"]
    assert "../notebooks/00_squares.html" in lesson.links and "01_cubes.html#the-cube" in lesson.links
    assert "interview/00_squares.html" in lesson.links, "its questions"
    assert "lessons/00_squares.html" in pages["index.html"].links
    assert "../00_squares.html" in pages["lessons/interview/00_squares.html"].links
    pictures = [image for image in lesson.images if image.get("alt") == "a dot"]
    assert (lesson.path.parent / pictures[0]["src"]).read_bytes() == b"png"


def test_an_appendix_is_a_page_that_its_unit_links_to(pages):
    assert "../00_squares.html" in pages["lessons/appendix/00_more.html"].links
    assert "appendix/00_more.html" in pages["lessons/00_squares.html"].links


def test_one_reads_a_unit_in_its_order_and_then_the_next(pages):
    order = [
        "lessons/00_squares",
        "notebooks/00_squares",
        "exercises/00_squares",
        "lessons/interview/00_squares",
        "lessons/appendix/00_more",
    ]
    order += ["solutions/00_squares", "lessons/01_cubes"]
    for name, following in itertools.pairwise(order):
        right = re.search(r'<a class="right-next"\s+href="([^"]+)"', pages[f"{name}.html"].text)[1]
        assert (pages[f"{name}.html"].path.parent / right).resolve() == pages[f"{following}.html"].path


def test_formulas_become_mathml_and_comments_go(pages):
    text = pages["lessons/00_squares.html"].article
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in text and "$" not in text
    assert "<mtable" in text, "aligned"
    assert "claim" not in text
    assert "<strong>2</strong>" in text
    assert "<msup>" in pages["notebooks/00_squares.html"].text
    assert "MathJax" not in "".join(page.text for page in pages.values())


def test_pictures_keep_their_alt_texts_and_outputs_their_words(pages):
    page = pages["notebooks/00_squares.html"]
    assert "one grey dot" in [image.get("alt") for image in page.images]
    assert "<em>A dot.</em>" in page.text and "drawn" in page.text


def test_a_notebook_is_there_to_download_as_it_is(pages, course: Unit):
    page = pages["notebooks/00_squares.html"]
    (link,) = {link for link in page.links if link.endswith(".ipynb")}
    assert (page.path.parent / link).read_bytes() == course.notebook.read_bytes()


def test_exercises_show_the_task_and_not_the_answer(pages):
    text = pages["exercises/00_squares.html"].text
    assert "NotImplementedError" in text and "Discussion" not in text


def test_worked_answers_are_folded(pages):
    text = pages["solutions/00_squares.html"].article
    assert text.count("Show a worked answer") == 2 and "BEGIN SOLUTION" not in text
    before, found, _ = text.partition("a square is a product")
    assert found and before.rpartition("<details")[2].startswith("><summary>Discussion</summary>")
    assert before.count("<details") == before.count("</details>") + 1


def test_a_question_has_a_page_with_its_answers_folded(pages):
    text = pages["lessons/interview/00_squares.html"].article
    assert 'id="squares-why"' in text and 'data-kind="derivation" data-difficulty="2" data-role="research applied"' in text
    assert text.count("<details") == 4 and "Often said, and wrong" in text and "<msup>" in text
    assert "lessons/interview/00_squares.html#squares-why" in pages["questions.html"].links


def test_what_was_computed_for_an_answer_is_kept_until_something_changes(course: Unit, monkeypatch):
    from course.website import questions

    asked = []
    answer = website_questions(course)
    monkeypatch.setattr("course.interview.questions", lambda unit: asked.append(unit) or answer(unit))
    memory = course.root / "memory"
    first = questions.of(course, memory)
    assert questions.of(course, memory) == first and asked == ["00"]
    (course.root / "reference").mkdir()
    (course.root / "reference" / "x.py").write_text("")
    assert questions.of(course, memory) == first and asked == ["00", "00"]


def test_launch_buttons_come_with_the_address_of_the_repository(small_course: Unit):
    (small_course.root / "LICENSE").write_text("free")
    small_course.lesson.write_text("# Squares\n\n[the license](../LICENSE)\n")
    page = website.write(small_course.root).parent / "notebooks" / "00_squares.html"
    lesson = page.parent.parent / "lessons" / "00_squares.html"
    assert "mybinder" not in page.read_text() and "github" not in page.read_text()
    assert "LICENSE" not in lesson.read_text().partition("<article")[2]
    (small_course.root / "pyproject.toml").write_text('[project.urls]\nrepository = "https://github.com/a/b"\n')
    small_course.notebook.touch()
    website.write(small_course.root)
    assert "mybinder.org/v2/gh/a/b/main?urlpath=lab/tree/notebooks/00_squares.ipynb" in page.read_text()
    assert "colab.research.google.com/github/a/b/blob/main/notebooks/00_squares.ipynb" in page.read_text()
    assert "https://github.com/a/b/blob/main/LICENSE" in lesson.read_text()


def test_the_output_of_a_run_is_shown_in_place_of_the_committed_one(small_course: Unit):
    fresh = read(small_course.notebook)
    fresh.cells[2].outputs = [v4.new_output("stream", text="just now <b>\n")]
    index = website.write(small_course.root, executed={small_course.notebook: fresh}, summary={"00": "passed, 3 s"})
    page = Page(index.parent / "notebooks" / "00_squares.html")
    assert "just now &lt;b&gt;" in page.article and "one grey dot" not in page.article
    assert "passed, 3 s" in index.read_text()
    assert "drawn\\n" in small_course.notebook.read_text(), "the committed notebook is as it was"


def test_the_code_of_a_figure_is_folded_and_its_output_is_not(small_course: Unit):
    notebook = read(small_course.notebook)
    notebook.cells[2].metadata["tags"] = [HIDDEN]
    miniature.save(notebook, small_course.notebook)
    website.write(small_course.root)
    article = Page(small_course.root / "site" / "notebooks" / "00_squares.html").article
    folded = re.search(r'<details class="[^"]*\bhide\b.*?</details>', article, re.DOTALL)[0]
    assert "Show the code" in folded and "print" in folded and "one grey dot" in article.replace(folded, "")
    assert "print" not in article.replace(folded, "")


def test_only_what_changed_is_made_again_and_what_is_no_more_goes(small_course: Unit):
    made = []
    index = website.write(small_course.root)
    kept = (index.parent / "notebooks" / "00_squares.html").stat().st_mtime_ns
    (index.parent / "slides").mkdir()
    (index.parent / "slides" / "index.html").write_text("slides")
    small_course.lesson.with_name("01_cubes.md").write_text("# Cubes of cubes\n\n## The cube\n")
    small_course.exercise.unlink(missing_ok=True)
    small_course.solution.unlink()
    website.write(small_course.root, before_page=made.append)
    assert "Cubes of cubes" in (index.parent / "lessons" / "01_cubes.html").read_text()
    assert not (index.parent / "solutions" / "00_squares.html").exists()
    assert (index.parent / "slides" / "index.html").read_text() == "slides" and "slides/index.html" in Page(index).links
    assert (index.parent / "notebooks" / "00_squares.html").stat().st_mtime_ns == kept or "notebooks/00_squares" in map(str, made)


def test_a_notebook_that_cannot_be_read_costs_its_own_page_only(small_course: Unit):
    small_course.notebook.write_text('{"cells": [')
    with pytest.raises(CourseError, match=r"00_squares\.ipynb is not a notebook.*All other pages are written"):
        website.write(small_course.root)
    folder = small_course.root / "site"
    assert "is not a notebook" in (folder / "notebooks" / "00_squares.html").read_text()
    assert all((folder / name).exists() for name in ("index.html", "lessons/00_squares.html", "lessons/01_cubes.html"))


def shown(*cells, metadata=None):
    """The cells as a page shows them, and the pictures that it saved."""
    saved = {}
    source = Path("/course/notebooks/00_x.ipynb")
    notebook = v4.new_notebook(cells=list(cells), metadata=metadata or {})
    return page_notebook(notebook, source, Links(Path("/course"), {}), saved.__setitem__), saved


def test_sliders_say_where_they_live():
    view = v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"})
    state = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}}
    page, _ = shown(v4.new_code_cell("slider", outputs=[view]), metadata={"widgets": state})
    assert "open the notebook in Jupyter" in as_text(page) and "IntSlider" not in as_text(page) and "widget-state" not in as_text(page)


def test_a_picture_keeps_the_alt_text_of_its_own_and_is_not_given_an_empty_one():
    outputs = [
        v4.new_output("display_data", {"image/png": miniature.PIXEL}, metadata={"image/png": {"alt": alt}}) for alt in ("one [a]", "two")
    ]
    outputs.append(v4.new_output("display_data", {"image/png": miniature.PIXEL}))
    page, saved = shown(v4.new_code_cell("x", outputs=outputs))
    texts = [output.data["text/markdown"] for output in page.cells[0].outputs]
    assert texts[0].startswith(r"![one \[a\]](00_x.files/0-0.png") and texts[1].startswith("![two](")
    assert texts[2].startswith("![No description")
    assert len(saved) == 3 and saved["notebooks/00_x.files/0-1.png"].startswith(b"\x89PNG")


def test_a_picture_that_was_pasted_in_is_shown_and_one_that_is_missing_is_said():
    cell = v4.new_markdown_cell("![a dot](attachment:image.png) and ![the plan](attachment:plan.png)")
    cell.attachments = {"image.png": {"image/png": miniature.PIXEL}}
    page, saved = shown(cell)
    assert page.cells[0].source.startswith("![a dot](00_x.files/0-image.png) and *(A picture that this notebook does not hold: the plan.)*")
    assert list(saved) == ["notebooks/00_x.files/0-image.png"]


@pytest.mark.parametrize(
    "tex",
    [
        r"W' = W + \frac{\alpha}{r} B A",
        r"\lVert W - W_k \rVert_F^2 = \sum_{i>k} \sigma_i^2",
        r"\begin{aligned} a &= b \\ c &= d \end{aligned}",
        r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}",
        r"\mathbb{R}^{d \times r}, \quad \mathcal{N}(0, \sigma^2), \quad \operatorname{rank}(BA) \le r",
        r"a < b",
    ],
)
def test_the_formulas_of_the_field_are_known(tex):
    assert website.mathml(tex).startswith("<math")


def test_an_unknown_formula_stays_as_it_is():
    assert website.mathml(r"\nonsense{x}") == r'<code class="tex">\nonsense{x}</code>'
    assert website.mathml(r"a & b < c") == '<code class="tex">a &amp; b &lt; c</code>'


def test_code_is_left_alone():
    text = "a <!--gone--> b `<!--kept-->`\n\n```\n<!--kept too-->\n```\n"
    assert outside_code(text, lambda text: text.replace("<!--gone-->", "").upper()) == "A  B `<!--kept-->`\n\n```\n<!--kept too-->\n```\n"


def test_a_number_and_its_unit_stay_on_one_line():
    text = "# 10 % off\n\n| 0.068 ms | **1.28** × | 8 × 8 | 3 sorts | $2 s$ | 4 bits, 96 % |"
    expected = "# 10 % off\n\n| 0.068~ms | **1.28**~× | 8 × 8 | 3 sorts | $2 s$ | 4~bits, 96~% |"
    assert with_units(text) == expected.replace("~", "\u00a0")


def test_a_docstring_keeps_its_formulas_and_names_its_arguments():
    import ast

    text = "Sum ``x``, see :func:`a.b`, *not* a*b.\n\n    y = <x>\n      + 1\n\n"
    text += "Args:\n    x, y: of the\n        sum.\n    z: last: one.\n\nReturns:\n    The sum."
    page = docstring(ast.parse(f"def f():\n    {text!r}").body[0])
    assert "<p>Sum <code>x</code>, see <code>a.b</code>, <em>not</em> a*b.</p>" in page
    assert 'tabindex="0">y = &lt;x&gt;\n  + 1</pre>' in page
    assert "<dt><code>x, y</code></dt><dd>of the sum.</dd><dt><code>z</code></dt><dd>last: one.</dd>" in page
    assert '<p class="section">Returns</p>\n<p class="said">The sum.</p>' in page


def test_a_result_of_any_form_becomes_tables(tmp_path: Path):
    import json

    result = {"side": 8192, "rows": [{"work": "a<b", "ms": 0.0678, "deep": {"x": 1}}, {"work": "c", "ms": None}], "by": {"k": {"v": True}}}
    result |= {"uneven": {"a": {"b": {"c": [1, 2]}}, "d": [[1, 2], [3, 4]]}, "none": []}
    path = tmp_path / "benchmarks" / "recorded" / "card" / "speed.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"name": "speed", "device": "A Card", "day": "2026-01-01", "versions": {"torch": "2"}, "result": result}))
    (tmp_path / "benchmarks" / "speed.py").write_text('"""How fast it is."""\n\n\ndef main(): ...\n')
    made = recorded_pages(tmp_path)
    assert "How fast it is." in made["speed"] and "Recorded on 2026-01-01 with torch 2" in made["speed"] and "## A Card" in made["speed"]
    for words in ("a&lt;b", 'data-value="0.0678"', "<th>deep · x</th>", "<td>yes</td>", "<td>1, 2</td>", "8,192"):
        assert words in made["speed"], words
    assert 'href="speed.html#a-card"' in made["index"]


def test_every_recorded_result_says_what_was_measured():
    listed = recorded_pages(ROOT)["index"]
    assert listed.count("<tr>") > 20 and "<td></td>" not in listed


def test_python_without_a_translation_is_refused_by_file_and_line(tmp_path: Path):
    path = tmp_path / "x.py"
    for code in ("def f(x):\n    with x:\n        pass", "a = 1\nb = a @ a", "def f(x):\n    return x[1:]", "@cache\ndef f(): ..."):
        path.write_text(code)
        with pytest.raises(CourseError, match=r"x\.py, line 2"):
            translate({"x": path}, "modules")
