"""A result beside the recorded cards: ratios, the table, and a verdict that says what is not as expected."""

import copy

from course import beside

KNOWN = beside.cards("nf4_kernels")
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def entry(card: str, device: str | None = None, **changed: float) -> dict:
    """The record of ``card``, as if measured on ``device``, with numbers of its first row changed."""
    found = copy.deepcopy(KNOWN[card])
    found["result"]["rows"][0] |= changed
    return found | {"device": device or card}


def test_ratios_are_those_of_the_record():
    row, numbers = beside.rows(KNOWN[H100])["quantize"], KNOWN[H100]["result"]["rows"][0]
    assert row.peer == numbers["bitsandbytes"] / numbers["ours"] and row.limit == numbers["floor"] / numbers["ours"]
    assert len(beside.rows(KNOWN[H100])) == len(KNOWN[H100]["result"]["rows"])


def test_the_table_has_a_column_a_card_and_a_line_a_row():
    head, *lines, _, legend = beside.table(KNOWN).splitlines()
    assert head.split(maxsplit=4)[:4] == H100.split() and head.endswith(f" {H200}") and len(lines) == len(beside.rows(KNOWN[H200]))
    assert lines[0].split("  ")[0] == "quantize" and "0.0679 · 10.7× · 87%" in lines[0]
    assert legend.split(" · ") == ["our time in milliseconds", "the peer's over it (×)", "the limit's over it (%)"]


def test_the_table_has_what_two_cards_have_and_says_bytes_as_bytes():
    first = {
        "device": "A",
        "result": {"rows": [{"work": "x", "kept_bytes": {"ours": 2e6}, "error": {"ours": 1e-3}}, {"work": "y", "ours": 1.0}]},
    }
    second = {"device": "B", "result": {"rows": first["result"]["rows"][:1]}}
    assert [line.split("  ")[0] for line in beside.table({"A": first}).splitlines()[1:3]] == ["x, kept bytes", "y"]
    _, line, _, legend = beside.table({"A": first, "B": second}).splitlines()
    assert line.split("  ") == ["x, kept bytes", "2.0 MB", "2.0 MB"] and legend == "our time in milliseconds or our bytes"


def test_a_result_that_is_no_comparison_or_a_long_one_has_no_table():
    assert {beside.table(beside.cards(name)) for name in ("qlora_step", "growth", "fisher", "multi_lora")} == {""}


def test_the_same_card_is_held_to_its_own_record():
    assert beside.verdict(entry(H100), KNOWN).startswith("As expected: 14 rows")
    said = beside.verdict(entry(H100, ours=0.1), KNOWN)
    assert (
        said.startswith("Not as expected: 1 figure of 14 rows") and "quantize: 0.1 here, 0.06786 when it was recorded on this card" in said
    )


def test_a_run_faster_than_its_record_is_told():
    said = beside.verdict(entry(H100, ours=0.05), KNOWN)
    assert said.startswith("As expected: 14 rows") and "Faster than the record, quantize: 0.05 here, 0.06786 there" in said
    assert "Faster" not in beside.verdict(entry(H100, "NVIDIA B200", ours=0.05), KNOWN)


def test_another_card_is_held_by_ratios():
    assert beside.verdict(entry(H200, "NVIDIA B200"), KNOWN).startswith("As expected")
    said = beside.check(entry(H200, "NVIDIA B200", ours=0.2), KNOWN)
    assert len(said) == 2 and "the share of the limit is 0.22, on recorded cards 0.86 or more" in said[1]


def test_nothing_to_hold_it_to_is_said():
    assert "nothing to hold it to" in beside.verdict(entry(H100), {})


def test_the_figure_has_two_panels_and_is_left_out_without_ratios():
    assert len(beside.figure(KNOWN).axes) == 2
    assert beside.figure(beside.cards("qlora_step")) is None
