"""The decks: short, with notes, and in a browser every slide lies within its frame."""

import re
import subprocess
from pathlib import Path

import pytest

from course import ROOT, slides
from course.units import CourseError, units

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # from inside Sphinx and MyST
DECKS = slides.decks()
every_deck = pytest.mark.parametrize("deck", DECKS, ids=lambda path: path.stem)
CHROMIUM = next(
    (path for path in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")) if path.exists()), None
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("sphinx_revealjs")
    return {page.stem: page for page in slides.build(out=tmp_path_factory.mktemp("decks") / "slides")}


def test_every_unit_has_a_deck_that_the_overview_links_to():
    stems = [deck.stem for deck in DECKS]
    assert stems == ["overview", *(unit.stem for unit in units())]
    assert re.findall(r"\]\((\w+)\.md\)", DECKS[0].read_text(encoding="utf-8")) == stems[1:]


@every_deck
def test_a_deck_is_short_and_every_slide_has_notes(deck: Path):
    text = deck.read_text(encoding="utf-8")
    assert 6 <= slides.count(text) <= slides.MOST_SLIDES
    parts = re.split(r"^##? ", text, flags=re.MULTILINE)[1:]
    assert [part.splitlines()[0] for part in parts if part.count(":::{revealjs-notes}") != 1] == []
    assert parts[-1].startswith("Now you") or deck.stem == "overview"


@every_deck
def test_a_slide_holds_few_words(deck: Path):
    text = re.sub(
        r":::\{revealjs-notes\}.*?^:::$|<!--.*?-->|!?\[[^\]]*\]\([^)]*\)", " ", deck.read_text(encoding="utf-8"), flags=re.S | re.M
    )
    long = {part.splitlines()[0]: len(part.split()) for part in re.split(r"^##? ", text, flags=re.MULTILINE)[1:]}
    assert {title: words for title, words in long.items() if words > 130} == {}


@every_deck
def test_no_worked_answer_is_on_a_slide(deck: Path):
    assert "solutions/" not in deck.read_text(encoding="utf-8")


def test_the_pages_hold_numbers_formulas_and_notes_and_ask_for_nothing_outside(built: dict[str, Path]):
    page = built["02_lora"].read_text(encoding="utf-8")
    assert "claim" not in page and "<math" in page and 'class="notes"' in page
    assert not re.search(r'(?:src|href)="https?://', page)


def test_make_builds_them():
    done = subprocess.run(["make", "--dry-run", "slides"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "-m course slides" in done.stdout


def test_a_mistake_in_a_deck_is_said(tmp_path: Path):
    pytest.importorskip("sphinx_revealjs")
    (tmp_path / "decks").mkdir()
    (tmp_path / "decks" / "overview.md").write_text("# Title\n\n![none](none.png)\n")
    with pytest.raises(CourseError, match=r"(?s)mistakes.*none\.png"):
        slides.build(tmp_path / "decks", tmp_path / "out")


OUTSIDE = """() => {
    const here = Reveal.getCurrentSlide(), frame = here.getBoundingClientRect(), bad = [];
    for (const each of here.querySelectorAll('h1, h2, p, li, table, img, math, pre, blockquote')) {
        if (each.closest('aside')) continue;
        const box = each.getBoundingClientRect();
        if (box.bottom > frame.top + HEIGHT - 8 || box.right > frame.left + WIDTH - 8 || box.left < frame.left || box.top < frame.top)
            bad.push(each.tagName + ' ' + Math.round(box.right) + ', ' + Math.round(box.bottom));
        if (each.tagName == 'IMG' && !each.naturalWidth) bad.push('picture missing');
        if (each.tagName == 'PRE' && each.scrollWidth > each.clientWidth + 1) bad.push('code too wide');
    }
    return bad.length ? [here.querySelector('h1, h2').innerText, ...bad] : [];
}""".replace("HEIGHT", str(slides.HEIGHT)).replace("WIDTH", str(slides.WIDTH))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_no_slide_is_larger_than_its_frame(built: dict[str, Path]):
    playwright = pytest.importorskip("playwright.sync_api")
    troubles, asked = [], []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--allow-file-access-from-files"])
        page = browser.new_page(viewport={"width": slides.WIDTH, "height": slides.HEIGHT})
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        for name, path in built.items():
            page.goto(path.as_uri())
            page.wait_for_function("window.Reveal && Reveal.isReady()")
            for _ in range(page.evaluate("Reveal.getTotalSlides()")):
                if found := page.evaluate(OUTSIDE):
                    troubles.append(f"{name}: {found}")
                page.evaluate("Reveal.next()")
        browser.close()
    assert troubles == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
