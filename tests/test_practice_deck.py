"""The Anki deck, opened by Anki's own package: a later deck updates notes, and formulas are Anki's."""

import re
import sys

import pytest
from practice_helpers import ENTRIES, entry, use_bank

from course import cli
from course.practice import bank, deck
from course.practice.answers import Answers
from course.units import units

anki = pytest.importorskip("anki.collection", reason="Anki's package is not installed")


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    return use_bank(tmp_path, monkeypatch)


@pytest.fixture
def collection(tmp_path):
    opened = anki.Collection(str(tmp_path / "collection.anki2"))
    yield opened
    opened.close()


def write(path, chosen=None):
    with Answers() as answers:
        count = deck.write(path, bank.chosen(chosen or bank.Choice()), units(), answers)
    return path, count


def bring_in(collection, path):
    request = anki.ImportAnkiPackageRequest(
        package_path=str(path), options=anki.ImportAnkiPackageOptions(merge_notetypes=True, update_notes=0, update_notetypes=0)
    )
    return collection.import_anki_package(request).log


def note(collection, name: str):
    (found,) = collection.find_notes(f"Id:{name}")
    return collection.get_note(found)


def test_anki_takes_the_deck(collection, tmp_path):
    path, count = write(tmp_path / "deck.apkg")
    log = bring_in(collection, path)
    assert count == len(log.new) == len(ENTRIES) and not log.updated and not log.duplicate
    assert {name.name for name in collection.decks.all_names_and_ids()} >= {"PEFT course::00 memory budget", "PEFT course::02 lora"}
    design = note(collection, "a-design")
    assert set(design.tags) == {"unit::02", "kind::design", "role::infrastructure", "difficulty::2", "asked::often"}
    (card,) = design.cards()
    assert "What about a-design?" in card.question() and "Short on" not in card.question()
    for text in ("Short on a-design.", "Names what it gives up.", "And then?", "Because it is."):
        assert text in card.answer()
    assert "course case 01_alpha_forgotten" in note(collection, "a-case").cards()[0].question()


def test_a_later_deck_updates_the_notes_and_doubles_none(collection, tmp_path, monkeypatch):
    bring_in(collection, write(tmp_path / "first.apkg")[0])
    card = note(collection, "an-estimate").cards()[0]
    card.ivl, card.type, card.queue, card.due = 33, 2, 2, 400
    collection.update_card(card)
    before = {n: note(collection, n).id for n in ("an-estimate", "a-design")}
    collection.db.execute("update notes set mod = mod - 10")  # Anki counts whole seconds
    better = entry("an-estimate", "estimate", short="A better short answer.", difficulty=5)
    changed = [better, *(each for each in ENTRIES if each["id"] != "an-estimate")]
    use_bank(tmp_path, monkeypatch, [*changed, entry("one-more", "concept")])
    log = bring_in(collection, write(tmp_path / "second.apkg")[0])
    assert len(log.new) == 1 and collection.note_count() == len(ENTRIES) + 1
    assert {n: note(collection, n).id for n in before} == before
    updated = note(collection, "an-estimate")
    assert "A better short answer." in updated["Short"] and "difficulty::5" in updated.tags
    assert updated.cards()[0].ivl == 33, "what Anki knows of the card stays"
    assert len([n for n in collection.models.all_names() if n.startswith("PEFT course")]) == 1


@pytest.mark.parametrize(
    "markdown, shown",
    [
        ("with $\\sigma_{r+1}$ in it", r"<p>with \(\sigma_{r+1}\) in it</p>"),
        ("$$a < b$$", r"<p>\[a &lt; b\]</p>"),
        ("it costs $5 and $6", "<p>it costs $5 and $6</p>"),
        ("$A_1$ and $B_1$", r"<p>\(A_1\) and \(B_1\)</p>"),
        ("a < b & `c_d_e` **f**", "<p>a &lt; b &amp; <code>c_d_e</code> <strong>f</strong></p>"),
        ("- one\n- two", "<ul>\n<li>one</li>\n<li>two</li>\n</ul>"),
        ("<b>x</b>", "<p>&lt;b&gt;x&lt;/b&gt;</p>"),
        ("", ""),
    ],
)
def test_markdown_becomes_what_anki_shows(markdown, shown):
    assert deck.html(markdown) == shown


def test_ids_are_those_of_all_later_decks():
    """Changing one of these doubles every note of somebody who learns with the deck."""
    import genanki

    assert genanki.guid_for(deck.NAME, "lora-alpha") == "cDG^eR1bF3"
    assert deck._number(f"{deck.NAME}: question") == 1213539013 and deck._number(f"{deck.NAME}: unit 02") == 2047194504


def test_formulas_of_the_course_are_all_taken(monkeypatch):
    """No dollar sign is left around what looks like LaTeX."""
    monkeypatch.undo()
    for _, raw in bank.written():
        for text in (raw["question"], raw["short"], raw["deep"], *raw["follow_ups"], *raw["wrong"].values()):
            assert not re.search(r"\$[^$]*\\", deck.html(text.replace("{{", "{").replace("}}", "}")))


def test_the_command(tmp_path, monkeypatch, capsys):
    def course(*argv):
        monkeypatch.setattr(sys, "argv", ["course", "anki", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, " ".join((printed.out + printed.err).split())

    path = tmp_path / "new" / "mine.apkg"
    status, printed = course(str(path), "--unit", "00")
    assert status == 0 and path.exists() and "wrote 1 note to" in printed
    status, printed = course(str(tmp_path / "deck.txt"))
    assert status == 2 and "must end in .apkg" in printed
