"""A result beside the recorded cards: ratios, the table, and a verdict that says what is not as expected."""

import copy

import pytest

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
    heads, lines = beside.table(KNOWN)
    assert heads == ["", H100, H200] and len(lines) == len(beside.rows(KNOWN[H200]))
    assert lines[0][1] == "0.0679 · 10.7× · 87%"
    assert beside.legend(KNOWN).split(" · ") == ["our time", "the peer's over it (×)", "the limit's over it (%)"]


def test_the_table_of_kernel_limits_fits_a_terminal_and_has_one_line_for_all_that_was_tried():
    known = beside.cards("kernel_limits")
    _, lines = beside.table(known)
    by_label = dict(zip([line[0] for line in lines[::2]], zip(lines[::2], lines[1::2], strict=True), strict=True))
    ours, tried = by_label["linear, 1 row"]
    assert tried[0] == beside.TRIED and ours[1].endswith("54% · 0.542 / 0.70") and "× our speed: ahead" in tried[1]
    assert max(len(line[0]) for line in lines) + max(len(line[1]) for line in lines) <= 80
    assert beside.legend(known).endswith("reached / bar")


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


@pytest.mark.parametrize("name", ["qlora_step", "memory_peaks", "nf4_training", "lora_layer", "growth"])
def test_every_kind_of_result_has_a_table(name):
    known = beside.cards(name)
    heads, lines = beside.table(known)
    assert len(heads) == len(known) + 1 and lines and all(len(line) == len(heads) for line in lines)
