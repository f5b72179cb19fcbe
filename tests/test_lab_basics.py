"""The lab's instruments: devices, seeds, meters, recorded results and figures."""

import base64
import json
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from course.lab import device, meters, plotting, recorded, seed_everything
from course.lab.devices import device_name

CPU = torch.device("cpu")


def test_the_device_is_the_gpu_where_there_is_one():
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("count, name", [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_the_name_of_a_cpu(monkeypatch, count, name):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert device_name(CPU) == name


def test_a_seed_gives_the_same_numbers_twice():
    def draw():
        seed_everything(2**40)  # numpy takes 32 bits only
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_peak_memory_on_a_cpu_sees_what_was_freed_again():
    with meters.peak_memory(CPU) as peak:
        held = torch.ones(50_000_000)  # 200 MB, all written
        held.sum()
        del held
    assert 190e6 < peak.bytes < 300e6
    assert peak.before > 0 and peak.total == peak.before + peak.bytes


def test_peak_memory_stops_watching_after_an_error():
    import threading

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), meters.peak_memory(CPU):
        raise ZeroDivisionError
    assert threading.active_count() == threads


def test_process_peak_is_never_below_what_is_held_now():
    import psutil

    # pages are counted a little late, hence the 2 %
    assert meters.process_peak() >= 0.98 * psutil.Process().memory_info().rss


def test_milliseconds_is_the_median_after_the_warmup(monkeypatch):
    now, lengths = [0.0], iter([9.0, 9.0, 0.001, 0.002, 0.500])  # two slow warm-ups, then three calls

    def work():
        now[0] += next(lengths)

    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    assert meters.milliseconds(work, repeats=3, warmup=2, where=CPU) == pytest.approx(2.0)


@pytest.mark.gpu
def test_peak_memory_on_cuda_is_the_allocators_own_count():
    with meters.peak_memory(torch.device("cuda")) as peak:
        torch.empty(1_000_000, dtype=torch.float32, device="cuda")
    assert peak.bytes == pytest.approx(4e6, abs=2**21)


@pytest.mark.gpu
def test_milliseconds_on_cuda_waits_for_the_work():
    x = torch.randn(4096, 4096, device="cuda")
    assert meters.milliseconds(lambda: x @ x, repeats=5, where=x.device) > 0.5  # 137 GFLOP can't be done faster


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (14e9, "14.0 GB"),
        (1.2e12, "1.2 TB"),
        (5e15, "5000.0 TB"),
        (-2500, "-2.5 kB"),
    ],
)
def test_bytes_are_shown_in_decimal_units(count, text):
    assert meters.show_bytes(count) == text


def test_a_result_comes_back_as_it_was_recorded(tmp_path):
    path = recorded.save("sweep", {"loss": [1.5, 0.5]}, folder=tmp_path, where=CPU)
    assert path == tmp_path / recorded.slug(device_name(CPU)) / "sweep.json"
    entry = recorded.load("sweep", folder=tmp_path)
    assert entry["result"] == {"loss": [1.5, 0.5]}
    assert entry["device"] == device_name(CPU) and entry["versions"]["torch"] == torch.__version__
    assert recorded.provenance(entry) == f"Recorded on {entry['device']}, {entry['day']} (torch {torch.__version__})."
    assert [file.name for file in path.parent.iterdir()] == ["sweep.json"]  # nothing half-written is left


def test_what_json_cannot_hold_leaves_the_old_result(tmp_path):
    recorded.save("sweep", 1, folder=tmp_path, where=CPU)
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            recorded.save("sweep", bad, folder=tmp_path, where=CPU)
    assert recorded.load("sweep", folder=tmp_path)["result"] == 1


def put(folder, device_folder, day, result):
    (folder / device_folder).mkdir(parents=True)
    entry = {"name": "x", "device": device_folder, "day": day, "versions": {"torch": "2"}, "result": result}
    (folder / device_folder / "x.json").write_text(json.dumps(entry))


def test_of_several_devices_the_newest_or_the_named_one(tmp_path):
    put(tmp_path, "nvidia-h100", "2026-01-02", "new")
    put(tmp_path, "cpu-2-threads", "2026-01-01", "old")
    assert recorded.load("x", folder=tmp_path)["result"] == "new"
    assert recorded.load("x", device="cpu", folder=tmp_path)["result"] == "old"
    with pytest.raises(FileNotFoundError, match=r"no recorded result 'y'.*nvidia-h100/x"):
        recorded.load("y", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no recorded result 'x' \(device 'mps'\)"):
        recorded.load("x", device="mps", folder=tmp_path)


ROWS = [{"work": "quantize", "ms": 1.0}, {"work": "linear", "rows": 1, "ms": 2.0}, {"work": "linear", "rows": 16, "ms": 3.0}]


@pytest.mark.parametrize("result", [ROWS, {"side": 8192, "rates": [1.0, 2.0], "none": [], "rows": ROWS}])
def test_a_row_is_found_by_what_its_columns_hold(tmp_path, result):
    put(tmp_path, "nvidia-h100", "2026-01-02", result)
    assert recorded.row("x", folder=tmp_path, work="linear", rows=16)["ms"] == 3.0
    assert recorded.row("x", folder=tmp_path, work="quantize") == ROWS[0]
    assert recorded.row("x", folder=tmp_path, rows=None) == ROWS[0]  # a column that a row lacks holds None


@pytest.mark.parametrize(
    "where, words",
    [
        ({"work": "linear", "rows": 2}, r"0 rows of 'x' have {'work': 'linear', 'rows': 2}; there are {.*'rows': \['1', '16', 'None'\]}"),
        ({"who": "ours"}, r"0 rows of 'x' .*{'who': \['None'\]}"),
        ({"work": "linear"}, r"2 rows of 'x' .*{'work': \['linear', 'quantize'\]}"),
        ({}, "3 rows of 'x'"),
    ],
)
def test_no_row_or_several_are_refused(tmp_path, where, words):
    put(tmp_path, "nvidia-h100", "2026-01-02", ROWS)
    with pytest.raises(LookupError, match=words):
        recorded.row("x", folder=tmp_path, **where)


@pytest.mark.parametrize("result, count", [({"first": ROWS, "second": ROWS}, 2), ({"first": 1.0, "second": [1.0]}, 0)])
def test_a_row_needs_one_table(tmp_path, result, count):
    put(tmp_path, "nvidia-h100", "2026-01-02", result)
    with pytest.raises(ValueError, match=rf"'x' holds {count} tables: its keys are \['first', 'second'\]"):
        recorded.row("x", folder=tmp_path, work="quantize")


def test_a_row_is_that_of_the_newest_device_or_of_the_named_one(tmp_path):
    put(tmp_path, "nvidia-h200", "2026-01-02", [{"work": "quantize", "ms": 0.5}])
    put(tmp_path, "nvidia-h100", "2026-01-01", ROWS)
    assert recorded.row("x", folder=tmp_path, work="quantize")["ms"] == 0.5
    assert recorded.row("x", "h100", tmp_path, work="quantize")["ms"] == 1.0
    with pytest.raises(FileNotFoundError, match=r"no recorded result 'x' \(device 'mps'\)"):
        recorded.row("x", "mps", tmp_path, work="quantize")


def test_the_slug_of_a_device():
    assert recorded.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert recorded.slug("CPU, 2 threads") == "cpu-2-threads"


def test_live_on_a_gpu_and_recorded_without(tmp_path, monkeypatch, capsys):
    def load(name: str, device: str | None) -> dict:
        return {"device": device or "card", "day": "2026-01-01", "versions": {"torch": "2"}, "result": "recorded"}

    monkeypatch.setattr(recorded, "load", load)
    monkeypatch.setattr(recorded, "device", lambda: CPU)
    assert recorded.live_or_recorded("x", lambda: "live") == "recorded"
    assert capsys.readouterr().out == "Recorded on card, 2026-01-01 (torch 2).\n"
    assert recorded.live_or_recorded("x", lambda: "live", recorded_on="h200") == "recorded"
    assert capsys.readouterr().out.startswith("Recorded on h200, ")
    assert recorded.live_or_recorded("x", lambda: "live", needs_gpu=False) == "live"
    assert capsys.readouterr().out.startswith("Measured now on ")
    monkeypatch.setattr(recorded, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(recorded, "device_name", lambda: "card")
    assert recorded.live_or_recorded("x", lambda: "live") == "live"
    assert capsys.readouterr().out == "Measured now on card.\n"


@pytest.fixture
def displayed(monkeypatch):
    """What a cell would display: (what, keyword arguments) pairs."""
    shown = []
    monkeypatch.setattr(plotting, "display", lambda what, **settings: shown.append((what, settings)))
    return shown


def test_a_shown_figure_carries_its_alt_text_and_its_caption(displayed):
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    plotting.show(figure, caption="It rises.", alt="A line from 0 to 1.")
    (picture, settings), (caption, _) = displayed
    png = picture["image/png"] if isinstance(picture["image/png"], bytes) else base64.b64decode(picture["image/png"])
    assert png.startswith(b"\x89PNG") and picture["text/plain"] == "A line from 0 to 1."
    assert settings == {"raw": True, "metadata": {"image/png": {"alt": "A line from 0 to 1."}}}
    assert caption.data == "*It rises.*"
    assert not plt.fignum_exists(figure.number)  # a figure left open is drawn twice and keeps its memory


def test_a_figure_as_a_png_is_closed():
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    assert plotting.png(figure).startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("texts", [{"caption": " ", "alt": "x"}, {"caption": "x", "alt": ""}])
def test_a_figure_without_words_is_refused(displayed, texts):
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="caption"):
        plotting.show(figure, **texts)
    assert displayed == []
    plt.close(figure)


def test_the_colours_are_told_apart_by_colour_blind_readers_too():
    """Simulated as by Machado, Oliveira and Fernandes 2009 (full deuteranopia and protanopia), the first six stay apart."""
    simulations = {
        "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    }
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in plotting.COLOURS])
    for matrix in simulations.values():
        seen = rgb @ np.array(matrix).T
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 9 * np.eye(len(seen))
        assert distances.min() > 0.15


def test_a_band_reaches_from_the_lowest_to_the_highest_seed():
    figure, axes = plt.subplots()
    plotting.with_spread(axes, [0, 1, 2], [[1, 2, 3], [3, 2, 5]], label="loss")
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_ydata().tolist() == [2, 2, 4] and line.get_label() == "loss"
    edges = band.get_paths()[0].vertices
    assert edges[:, 1].min() == 1 and edges[:, 1].max() == 5
    plt.close(figure)


def test_the_style_is_set_for_the_whole_process():
    with plt.rc_context():
        plotting.use_style()
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == plotting.COLOURS
        assert not plt.rcParams["axes.spines.top"]


@pytest.mark.parametrize("horizontal", [False, True])
def test_stacked_bars_add_up_and_leave_room_at_their_end(horizontal):
    _, axes = plt.subplots()
    total = plotting.stacked(axes, ["a", "b"], {"one": [1, 2], "two": [3, 0], "none": [0, 0]}, horizontal)
    assert total.tolist() == [4, 2]
    starts = [bar.get_x() if horizontal else bar.get_y() for bar in axes.patches]
    assert starts == [0, 0, 1, 2, 4, 2]
    assert [text.get_text() for text in axes.legend().get_texts()] == ["one", "two", "none"]
    assert (axes.get_xlim if horizontal else axes.get_ylim)()[1] > 4
    with pytest.raises(ValueError, match="parts has 2 entries, but there are 1 colours"):  # none is left out in silence
        plotting.stacked(axes, ["a"], {"one": [1], "two": [2]}, horizontal, colours=["black"])
    plt.close("all")
