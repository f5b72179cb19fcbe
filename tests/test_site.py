"""The pages: formulas without a network, alt texts, links between the course's files."""

import re
from html.parser import HTMLParser
from pathlib import Path

import miniature
import pytest
from nbformat import v4

from course import build, site
from course.notebooks import read
from course.units import CourseError, Unit, units


class Page(HTMLParser):
    """What a reader gets: links, pictures and scripts of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.images, self.loads, self.path = [], [], [], path
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a":
            self.links.append(attributes.get("href", ""))
        if tag == "img":
            self.images.append(attributes)
        if tag in ("script", "link", "iframe"):
            self.loads.append((tag, attributes))


@pytest.fixture
def pages(small_course: Unit):
    build.write(build.exercises(small_course.root))
    index = site.write(small_course.root)
    return {str(path.relative_to(index.parent)): Page(path) for path in sorted(index.parent.rglob("*.html"))}


def test_there_is_a_page_for_every_part_and_an_index(pages):
    assert set(pages) == {
        "index.html",
        "lessons/00_squares.html",
        "lessons/01_cubes.html",
        "lessons/appendix/00_more.html",
        "notebooks/00_squares.html",
        "exercises/00_squares.html",
    }


def test_no_page_needs_the_network(pages):
    for page in pages.values():
        assert page.loads == []
        assert not re.search(r'(?:src|href)="(?:https?:)?//', page.text)


def test_every_link_leads_somewhere(pages):
    for page in pages.values():
        for link in page.links:
            target, _, heading = link.partition("#")
            goal = (page.path.parent / target).resolve() if target else page.path
            assert goal.exists(), f"{page.path.name}: {link}"
            if heading:
                assert f'id="{heading}"' in goal.read_text()


def test_links_to_notebooks_and_lessons_lead_to_their_pages(pages):
    lesson = pages["lessons/00_squares.html"]
    assert "../notebooks/00_squares.html" in lesson.links and "01_cubes.html#the-cube" in lesson.links
    assert "lessons/00_squares.html" in pages["index.html"].links
    assert (lesson.path.parent / lesson.images[0]["src"]).read_bytes() == b"png"


def test_an_appendix_is_a_page_that_its_unit_links_to(small_course: Unit):
    page = small_course.lesson.parent / "appendix" / small_course.lesson.name
    page.parent.mkdir(exist_ok=True)
    page.write_text("# More squares\n\nBack to the [lesson](../00_squares.md).\n")
    folder = site.write(small_course.root).parent
    assert "../00_squares.html" in Page(folder / "lessons" / "appendix" / "00_squares.html").links
    assert "appendix/00_squares.html" in Page(folder / "lessons" / "00_squares.html").links


def test_formulas_become_mathml_and_comments_go(pages):
    text = pages["lessons/00_squares.html"].text
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in text and "$" not in text.partition("<main>")[2]
    assert "<mtable" in text, "aligned"
    assert "claim" not in text
    assert "<strong>2</strong>" in text
    assert "<msup>" in pages["notebooks/00_squares.html"].text


def test_pictures_keep_their_alt_texts_and_outputs_their_words(pages):
    page = pages["notebooks/00_squares.html"]
    assert [image["alt"] for image in page.images] == ["one grey dot"]
    assert "<em>A dot.</em>" in page.text and "drawn" in page.text


def test_exercises_show_the_task_and_not_the_answer(pages):
    text = pages["exercises/00_squares.html"].text
    assert "NotImplementedError" in text and "Discussion" not in text


def test_the_output_of_a_run_is_shown_in_place_of_the_committed_one(small_course: Unit):
    fresh = read(small_course.notebook)
    fresh.cells[2].outputs = [v4.new_output("stream", text="just now <b>\n")]
    index = site.write(small_course.root, executed={small_course.notebook: fresh}, summary={"00": "passed, 3 s"})
    text = (index.parent / "notebooks" / "00_squares.html").read_text()
    assert "just now &lt;b&gt;" in text and "drawn" not in text.partition("<main>")[2].replace("'drawn'", "")
    assert "passed, 3 s" in index.read_text()
    assert "drawn\\n" in small_course.notebook.read_text(), "the committed notebook is as it was"


def test_sliders_say_where_they_live():
    view = v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"})
    state = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}}
    body = site.notebook_body(v4.new_notebook(cells=[v4.new_code_cell("slider", outputs=[view])], metadata={"widgets": state}))
    assert "open the notebook in Jupyter" in body and "IntSlider" not in body and "<script" not in body


def test_a_picture_without_alt_text_is_not_given_an_empty_one():
    output = v4.new_output("display_data", {"image/png": miniature.PIXEL})
    assert "No description" in site.notebook_body(v4.new_notebook(cells=[v4.new_code_cell("x", outputs=[output])]))


def test_a_picture_that_was_pasted_in_is_shown_and_one_that_is_missing_is_said():
    cell = v4.new_markdown_cell("![a dot](attachment:image.png) and ![the plan](attachment:plan.png)")
    cell.attachments = {"image.png": {"image/png": miniature.PIXEL}}
    body = site.notebook_body(v4.new_notebook(cells=[cell]))
    assert f'src="data:image/png;base64,{miniature.PIXEL}"' in body and 'alt="a dot"' in body
    assert "(A picture that this notebook does not hold: the plan.)" in body


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
    assert site.mathml(tex).startswith("<math")


def test_an_unknown_formula_stays_as_it_is():
    assert site.mathml(r"\nonsense{x}") == r'<code class="tex">\nonsense{x}</code>'
    assert site.mathml(r"a & b < c") == '<code class="tex">a &amp; b &lt; c</code>'


def written() -> list[Path]:
    return [path for unit in units() for path in (unit.lesson, *unit.appendices, unit.notebook, unit.exercise) if path.exists()]


@pytest.mark.parametrize("path", written(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_formula_of_the_course_is_drawn(path: Path):
    texts = [path.read_text()] if path.suffix == ".md" else [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    for text in texts:
        body = site.markdown(text)
        assert 'class="tex"' not in body, re.findall(r'<code class="tex">(.*?)</code>', body)
        outside = re.sub(r"<(pre|code|math)\b.*?</\1>", "", body, flags=re.DOTALL)
        assert "$" not in outside, f"a $ that opens no formula: {outside[max(0, outside.find('$') - 40) : outside.find('$') + 40]!r}"


def test_every_link_of_the_course_leads_somewhere(tmp_path: Path):
    """The real lessons, notebooks and README, as pages: no dead relative link, no missing heading."""
    index, dead = site.write(folder=tmp_path / "site"), []
    for path in sorted(index.parent.rglob("*.html")):
        for link in Page(path).links:
            target, _, heading = link.partition("#")
            if re.match(r"[a-z]+:", link) or link.startswith("#cell-id"):
                continue
            goal = (path.parent / target).resolve() if target else path
            if not goal.exists() or (heading and goal.suffix == ".html" and f'id="{heading}"' not in goal.read_text()):
                dead.append(f"{path.relative_to(index.parent)}: {link}")
    assert dead == []


def test_a_notebook_that_cannot_be_read_costs_its_own_page_only(small_course: Unit):
    small_course.notebook.write_text('{"cells": [')
    with pytest.raises(CourseError, match=r"00_squares\.ipynb is not a notebook.*All other pages are written"):
        site.write(small_course.root)
    folder = small_course.root / "site"
    assert "is not a notebook" in (folder / "notebooks" / "00_squares.html").read_text()
    assert all((folder / name).exists() for name in ("index.html", "lessons/00_squares.html", "lessons/01_cubes.html"))
