"""What the figures of unit 02 show, and what they leave out."""

import statistics

import pytest

from course import figures
from course.figures import lora
from course.lab import recorded


def means(points: list[list[float]]) -> tuple[float, float]:
    learned, forgotten = zip(*points, strict=True)
    return statistics.fmean(learned), statistics.fmean(forgotten)


def test_every_run_of_the_shown_configurations_is_in_the_data():
    data, result = lora.forgetting_data(), recorded.load("gemma_lora", "h100")["result"]
    runs = [run for run in result["runs"] if run["config"] in lora.SHOWN]
    assert sum(len(seeds) for by_rate in data["points"].values() for seeds in by_rate.values()) == len(runs)
    for row in result["summary"]:
        if row["config"] in lora.SHOWN:
            learned, forgotten = means(data["points"][row["config"]][f"{row['lr']:g}"])
            assert learned == pytest.approx(row["learned"][0], abs=1e-5) and forgotten == pytest.approx(row["forgotten"][0], abs=1e-5)


def test_what_is_not_drawn_forgot_more_than_all_that_is():
    points = [means(seeds) for by_rate in lora.forgetting_data()["points"].values() for seeds in by_rate.values()]
    drawn = [forgotten for learned, forgotten in points if learned >= lora.LEAST]
    left_out = [forgotten for learned, forgotten in points if learned < lora.LEAST]
    assert left_out and min(left_out) > max(drawn)


def test_the_best_rates_are_inside_the_grids():
    data = lora.rates_data()
    scores = [*data["rank_and_rate"]["scores"].values(), *data["alpha_and_rate"]["scores"]]
    for row in scores:
        means_of_row = [statistics.fmean(seeds) for seeds in row]
        assert 0 < means_of_row.index(min(means_of_row)) < len(row) - 1
        assert all(len(seeds) == 3 for seeds in row)


def test_the_factors_are_drawn_to_scale(tmp_path):
    figure = figures.figures()["lora_factors"]
    axes = figure.draw(figure.data()).axes[0]
    sizes = sorted((patch.get_height(), patch.get_width()) for patch in axes.patches)
    assert sizes == sorted(map(tuple, lora.factors_data().values())) and axes.get_aspect() == 1
