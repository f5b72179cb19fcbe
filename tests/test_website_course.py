"""The pages of the course itself: every link and formula of them, and how they look and behave in a real browser.

A run looks at every page in one of four ways (two widths, light and dark) and at the important ones in all; with ``COURSE_WHOLE_SITE=1``,
which `make test-site` sets, at every page in all of them. Contrast is measured on the important pages, whose colours are those of all.
"""

import functools
import html
import http.server
import itertools
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import unquote

import axe_playwright_python
import pytest

from course import ROOT, website
from course.units import units
from reference.memory import RECIPES, SHAPES, ModelShape, training_memory

WHOLE = os.environ.get("COURSE_WHOLE_SITE") == "1"
WAYS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
IMPORTANT = (
    "index.html",
    "calculator.html",
    "questions.html",
    "lessons/02_lora.html",
    "notebooks/04_nf4.html",
    "benchmarks/nf4_kernels.html",
)
ABORTED = "net::ERR_ABORTED"  # by going on to the next page
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages of the course, all of them. Claims are not recomputed for them: other tests do that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("course.claimed.value", lambda call: True)  # which formats as 1
        return website.write(folder=tmp_path_factory.mktemp("whole") / "site").parent


@pytest.fixture(scope="module")
def pages(site: Path) -> list[str]:
    return sorted(
        str(path.relative_to(site)) for path in site.rglob("*.html") if path.relative_to(site).parts[0] not in ("_static", ".work")
    )


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.troubles = watch(opened)
    yield opened
    opened.close()


def watch(page) -> list[str]:
    """What goes wrong on ``page`` from now on: errors that the console shows, and requests to anywhere else."""
    troubles = []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("requestfailed", lambda request: troubles.append(f"not loaded: {request.url}") if request.failure != ABORTED else None)
    elsewhere = re.compile(r"(file|data|blob|about):|http://127\.0\.0\.1")
    page.on("request", lambda request: None if elsewhere.match(request.url) else troubles.append(f"asked for {request.url}"))
    return troubles


# without a browser


def test_every_part_of_every_unit_has_its_page_and_nothing_was_amiss(site: Path, pages):
    for unit in units():
        for path in (unit.lesson, *unit.appendices, unit.notebook, unit.exercise, unit.solution, unit.interview):
            assert not path.exists() or str(path.relative_to(ROOT).with_suffix(".html")) in pages
    assert (site / ".work" / "warnings.txt").read_text() == ""


def test_every_link_leads_somewhere(site: Path, pages):
    known, dead = {name: (site / name).read_text() for name in pages}, []
    anchors = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in known.items()}
    for name, text in known.items():
        written = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1", text, flags=re.DOTALL)  # what a script would write is no link
        for link in re.findall(r'<(?:a|img|script|link)\b[^>]*?\b(?:href|src)="([^"]+)"', written):
            target, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            goal = (site / name).parent / unquote(target.partition("?")[0]) if target else site / name
            inside = os.path.relpath(goal, site)
            if not goal.exists() or inside.startswith("..") or (anchor and inside in anchors and unquote(anchor) not in anchors[inside]):
                dead.append(f"{name}: {link}")
    assert dead == []


def test_every_formula_is_drawn_and_every_comment_gone(site: Path, pages):
    found = []
    for name in pages:
        article = (site / name).read_text().partition("<article")[2].partition("</article>")[0]
        found += [f"{name}: {tex}" for tex in re.findall(r'<code class="tex">(.*?)</code>', article)]
        plain = re.sub(r"<(pre|code|math|script|table)\b.*?</\1>", "", article, flags=re.DOTALL)
        found += [f"{name}: {plain[max(0, at.start() - 30) : at.end() + 30]!r}" for at in re.finditer(r"\$|&lt;!--|<!--claim", plain)]
    assert found == []


def test_every_picture_of_an_article_has_an_alt_text(site: Path, pages):
    for name in pages:
        for picture in re.findall(r"<img\b[^>]*>", (site / name).read_text().partition("<article")[2]):
            assert re.search(r'alt="[^"]{8,}"', picture), f"{name}: {picture}"
            assert "No description" not in picture, f"{name}: {picture}"


# in a browser


@pytest.mark.parametrize("way", range(4), ids=[f"{width}-{scheme}" for width, scheme in WAYS])
def test_pages_are_sound(browser, site: Path, pages, way: int):
    """No error in the console, nothing asked of another machine, no sideways scroll, nothing that axe calls serious."""
    width, scheme = WAYS[way]
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    troubles, axe, found = watch(page), AXE.read_text(), []
    for number, name in enumerate(pages):
        if not (WHOLE or number % 4 == way or name in IMPORTANT):
            continue
        page.goto(f"file://{site / name}")
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            found.append(f"{name}: scrolls sideways")
        page.evaluate(axe)
        important = WHOLE or name in IMPORTANT  # of the others the article alone: what is around it is the same everywhere
        contrast = WHOLE or (important and width == 1280)  # four fifths of axe's time
        rules = {} if contrast else {"color-contrast": {"enabled": False}}
        serious = page.evaluate(
            """async ([important, rules]) => {
                 const where = (!important && document.querySelector("article.bd-article")) || document;
                 const found = await axe.run(where, {rules, preload: false, resultTypes: ["violations"], elementRef: false});
                 return found.violations.filter((each) => ["serious", "critical"].includes(each.impact))
                   .map((each) => `${each.id}: ${each.nodes[0].html.slice(0, 200)}`);
               }""",
            [important, rules],
        )
        found += [f"{name}: {each}" for each in serious + troubles]
        troubles.clear()
    context.close()
    assert found == []


def test_search_finds_nf4(page, site: Path):
    page.goto(f"file://{site}/search.html?q=NF4")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function("document.querySelector('#search-results').textContent.includes('04 · NF4')")
    assert page.troubles == []


def test_the_pages_work_from_a_server_too(page, site: Path):
    handler = functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/lessons/02_lora.html")
        page.click("nav.bd-links li.current a:has-text('Notebook')")
        page.wait_for_url("**/notebooks/02_lora.html")
        page.goto(f"http://127.0.0.1:{server.server_port}/search.html?q=NF4")
        page.wait_for_selector("#search-results li .context")
    finally:
        server.shutdown()
    assert page.troubles == []


def test_the_calculator_gives_what_python_gives(page, site: Path):
    odd = ("odd", 101, 3, 5, 1, 19, 333, 1001)  # sizes that no block and no byte divides
    shapes = SHAPES | {"odd": ModelShape(*odd)}
    grid = [
        {"shape": shape, "recipe": recipe, "batch": batch, "sequence": sequence, "rank": rank, "targets": targets}
        | {"checkpointing": checkpointing, "attention": attention, "padding": padding}
        for shape, recipe, (batch, sequence, rank), targets, (checkpointing, attention, padding) in itertools.product(
            shapes,
            RECIPES,
            ((1, 2048, 16), (3, 777, 5)),
            ("all-linear", ["q_proj", "v_proj"]),
            ((False, "fused", False), (True, "math", False), (True, "fused", True), (False, "math", True)),
        )
    ]
    page.goto(f"file://{site}/calculator.html")
    page.evaluate("(odd) => { memory.SHAPES.odd = new memory.ModelShape(...odd); }", odd)
    here = page.evaluate(
        "(grid) => grid.map((each) => { const b = answer(each); return [b.peak, b.moment, b.__str__(), b.moments]; })", grid
    )
    for settings, (peak, moment, printed, moments) in zip(grid, here, strict=True):
        named = {key: value for key, value in settings.items() if key not in ("shape", "recipe")}
        there = training_memory(shapes[settings["shape"]], RECIPES[settings["recipe"]], **named)
        assert (peak, moment, printed, moments) == (there.peak, there.moment, str(there), there.moments), settings
    assert page.troubles == []


def test_the_knobs_of_the_calculator_turn(page, site: Path):
    page.goto(f"file://{site}/calculator.html")
    page.select_option("[name=shape]", "Llama-3-70B")
    page.check("[name=checkpointing]")
    page.locator("[name=sequence]").focus()
    page.keyboard.press("ArrowRight")
    expected = training_memory(SHAPES["Llama-3-70B"], RECIPES["QLoRA"], sequence=4096, checkpointing=True)
    assert page.inner_text("#peak") == f"{expected.peak / 1e9:,.1f} GB"
    assert f"The fullest moment: {expected.moment}." in page.inner_text("#verdict")
    page.select_option("[name=shape]", "Gemma-3-270M")
    page.locator("[name=rank]").focus()
    page.keyboard.press("End")
    assert "rank must be" not in page.inner_text("#error")
    assert page.locator("#bars rect").count() > 8
    with pytest.raises(ValueError) as error:
        training_memory(SHAPES["Gemma-3-270M"], RECIPES["QLoRA"], rank=4096)
    said = page.evaluate(
        """() => { try { answer({shape: "Gemma-3-270M", recipe: "QLoRA", rank: 4096}) } catch (e) { return e.message } }"""
    )
    assert said == str(error.value)


def test_a_table_sorts_by_numbers_and_back(page, site: Path):
    page.goto(f"file://{site}/benchmarks/memory_peaks.html")
    table = page.locator("table.recorded").nth(1)
    column = table.locator("th").all_inner_texts().index("measured")
    read = "(t, c) => [...t.tBodies[0].rows].map((row) => Number(row.cells[c].dataset.value))"
    values = table.evaluate(f"(t) => ({read})(t, {column})")
    for ordered in (sorted(values), sorted(values, reverse=True)):
        table.locator("th button").nth(column).click()
        assert table.evaluate(f"(t) => ({read})(t, {column})") == ordered != values


def test_questions_are_chosen_and_unfold_for_paper(page, site: Path):
    page.goto(f"file://{site}/questions.html")
    rows = page.locator("table.questions tbody tr:visible")
    everything = rows.count()
    page.select_option("[name=difficulty]", "4")
    hard = page.locator('tr[data-difficulty="4"]').count()
    assert 0 < hard == rows.count() < everything
    assert page.inner_text(".filters output") == f"{hard} of {everything}"
    rows.first.locator("a").click()
    page.wait_for_url("**/lessons/interview/*.html#*")  # when it is loaded
    page.locator(":target").first.wait_for(state="attached")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0 < page.locator("details.answer").count()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.answer[open]").count() == 0


def test_pictures_open_sentences_wrap_and_short_tables_are_whole(page, site: Path):
    page.set_viewport_size({"width": 390, "height": 900})
    page.goto(f"file://{site}/notebooks/14_capstone.html")
    printed = page.locator(".cell_output pre.sentence")
    assert printed.count() > 0 and printed.evaluate_all("(all) => all.every((each) => each.scrollWidth <= each.clientWidth)")
    assert page.locator(".cell_output pre:not(.sentence)").count() > 0
    page.locator(".bd-article a.larger").first.click()
    page.wait_for_url(re.compile(r"\.png$"))
    page.goto(f"file://{site}/calculator.html")
    assert page.locator(".scroll").evaluate("(box) => box.scrollHeight <= box.clientHeight")
    written = "(svg) => 13 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width"
    assert page.locator("#bars svg").evaluate(written) > 10, "what stands beside the bars can be read on a phone"
    page.goto(f"file://{site}/questions.html")
    assert page.locator(".scroll").evaluate("(box) => box.scrollHeight > 2 * box.clientHeight"), "a long one keeps its heads in sight"


def test_code_is_copied_and_night_is_a_click_away(page, site: Path):
    page.goto(f"file://{site}/notebooks/04_nf4.html")
    assert page.locator("button.copybtn").count() > 5
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.locator("button.theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode=dark]:visible").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert json.loads((site / "_sources" / "notebooks" / "04_nf4.ipynb").read_text())["nbformat"] == 4
