"""The README's figure is drawn from what is recorded now."""

from PIL import Image

from course import ROOT, figures


def test_the_committed_figure_shows_the_recorded_results():
    with Image.open(figures.FIGURE) as picture:
        assert picture.text["Source"] == figures.fingerprint(figures.results()), "run python -m course.figures"


def test_the_readme_shows_it_with_an_alt_text():
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if figures.FIGURE.name in line]
    assert line.startswith("![") and len(line.partition("](")[0].split()) > 8


def test_another_result_is_noticed(tmp_path):
    entries = figures.results()
    before = figures.fingerprint(entries)
    entries["nf4_kernels"]["result"]["rows"][0]["ours"] *= 1.01
    assert figures.fingerprint(entries) != before
    path = figures.main(tmp_path / "figure.png")
    with Image.open(path) as picture:
        assert picture.text["Source"] == before and picture.width > 900
