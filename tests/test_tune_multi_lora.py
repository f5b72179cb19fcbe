"""The tuning of the grouped kernels: which sizes are tried, and what is made of their times."""

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from benchmarks import tune_multi_lora as tune
from reference.kernels.multi_lora import sizes


def test_the_best_of_each_part_is_joined():
    now = (256, 4, 3, 2, 16, 128, 4)
    a, b, c = (128, 4, 3, 2, 16, 128, 4), (256, 4, 3, 1, 4, 128, 4), (256, 4, 3, 2, 16, 64, 4)
    cells = {"one": {now: 2.0, a: 1.0, b: 3.0, c: 1.5}, "two": {now: 2.0, a: 2.0, b: 3.0, c: 1.5}}
    assert tune.joined(cells, now) == (128, 4, 3, 2, 16, 64, 4)
    assert [row for _, _, row in tune.ranked(cells)] == [a, c, now, b]
    cells["two"][a] = float("inf")  # does not fit
    assert tune.joined(cells, now)[0] == 256


def test_rows_of_sizes_begin_with_the_one_in_use_and_can_be_launched():
    for key, now in sizes.TABLE.items():
        rows = tune.rows_for(*key)
        assert rows[0] == now and len(set(rows)) == len(rows) > 12
        assert all(columns & (columns - 1) == 0 for row in rows for columns in (row[0], row[5]))


def test_sizes_in_use_are_those_of_the_table(monkeypatch):
    monkeypatch.setattr(sizes, "TABLE", dict(sizes.TABLE))
    tune.use(16, 16, (64, 8, 2, 1, 1, 32, 2))
    found = sizes.sizes(16, 16, 2)
    sizes.sizes.cache_clear()
    assert found.shrink == dict(COLUMNS=64, num_warps=8, num_stages=2) and found.expand == dict(COLUMNS=32, num_warps=2)
