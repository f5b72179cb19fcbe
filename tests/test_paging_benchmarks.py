"""The benchmarks of unit 07 in their dry run, on the CPU: every part gives its rows, and what must be equal is."""

import json
import sys

import bitsandbytes
import pytest
import torch
from torch import nn

from benchmarks import offloaded_layers, paged_adamw, paged_caps, paged_library
from course.lab import recorded


def dry_run(module, name, monkeypatch, tmp_path) -> dict:
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--out", str(tmp_path)])
    module.main()
    return recorded.load(name, folder=tmp_path)["result"]


def rows_by(rows: list[dict], *keys: str) -> dict:
    return {tuple(row[key] for key in keys): row for row in rows}


@pytest.mark.filterwarnings("ignore::UserWarning")  # bitsandbytes does not page on a CPU
def test_optimizers(monkeypatch, tmp_path):
    found = dry_run(paged_adamw, "paged_adamw", monkeypatch, tmp_path)
    assert set(found) >= set(paged_adamw.PARTS)
    known = recorded.load("paged_adamw", "h200")["result"]
    for part, keys in (("resident", ("model", "how")), ("offloaded", ("how",))):
        assert rows_by(found[part], *keys).keys() == rows_by(known[part], *keys).keys()
    cases = [[(row["policy"], row["streams"]) for row in each["paged"]] for each in (found, known)]
    assert cases[0] == cases[1]
    pages = found["paged"][0]["pages"]
    for row in found["paged"]:
        assert row["hit"] + row["in"] == pages
        assert row["policy"] != "lru" or row["hit"] == 0
    differ = found["bits"]["differ"]
    assert not any(count for name, count in differ.items() if name.startswith("paged"))
    assert set(found["timeline"]) == set(known["timeline"])
    assert "3 streams" in paged_adamw.table(found)


def test_the_record_has_no_gaps():
    known = recorded.load("paged_adamw", "h200")["result"]
    rows = [*known["resident"], *known["offloaded"], *known["paged"]]
    assert not [row for row in rows if "error" in row]
    assert not any(count for name, count in known["bits"]["differ"].items() if name.startswith("paged"))


def test_caps(monkeypatch, tmp_path):
    found = dry_run(paged_caps, "paged_caps", monkeypatch, tmp_path)["cap"]
    assert found["equal"]
    assert set(found) == set(recorded.load("paged_caps", "h200")["result"]["cap"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_library(monkeypatch, tmp_path):
    monkeypatch.setattr(paged_library, "resumed", lambda where: {"loaded on": where})
    found = dry_run(paged_library, "paged_library", monkeypatch, tmp_path)
    assert found["decay"]["apart, decay 0.0"] < 1e-6 and found["resume"] == {"loaded on": "cpu"}
    known = recorded.load("paged_library", "h200")["result"]
    assert set(found) == set(known)
    assert all(set(found[part]) == set(known[part]) for part in ("decay", "memory", "factors"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_process_that_resumes_says(capsys):
    paged_library.resume("cpu")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines[0]["after"] == [False, False] and lines[-1] == {"stepped": True}


def test_layers(monkeypatch, tmp_path):
    found = dry_run(offloaded_layers, "offloaded_layers", monkeypatch, tmp_path)
    known = recorded.load("offloaded_layers", "h200")["result"]
    assert found["equal"] and not [key for key in found if "error" in key]
    assert set(found) == set(known)
    assert {row["how"] for row in found["rows"]} == {row["how"] for row in known["rows"]}
    assert not [row for row in known["rows"] if "error" in row]
    first, last = found["training"]["losses"][0], found["training"]["losses"][-1]
    assert last < first


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_loads_the_librarys_state_and_fails_at_its_step():
    theirs, ours = (nn.Parameter(torch.ones(8)) for _ in range(2))
    for p in (theirs, ours):
        p.grad = torch.ones(8)
    library, optimizer = bitsandbytes.optim.PagedAdamW32bit([theirs]), torch.optim.AdamW([ours])
    library.step()
    assert {"state1", "state2", "step"} <= set(library.state[theirs])
    optimizer.load_state_dict(library.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        optimizer.step()


def test_the_librarys_adam_decays_the_weights_apart_from_the_gradient():
    p = nn.Parameter(torch.ones(8))
    p.grad = torch.zeros(8)
    bitsandbytes.optim.Adam32bit([p], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(p, torch.full((8,), 0.95))  # L2 in the gradient would have moved it by the rate
