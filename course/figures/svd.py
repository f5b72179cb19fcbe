"""Figures of unit 01: a photograph as a sum of pieces, spectra of weights and of their changes, and what a cut change still knows.

The notebook draws some of these panels again, from its own runs.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from course.figures import Figure
from course.lab import plotting, recorded

LESSON = "lessons/01_svd.md"
WEIGHT, UPDATE, NOISE = plotting.BLUE, plotting.RED, plotting.SKY
PIECES = (1, 10, 50)


def log_ticks(axis: plt.Axes, ticks: Iterable[int]) -> None:
    """A logarithmic axis of x with these ticks alone."""
    ticks = list(ticks)
    axis.set(xscale="log", xticks=ticks, xticklabels=[f"{tick:,}" for tick in ticks])
    axis.minorticks_off()


# The photograph


def photograph() -> Tensor:
    """scikit-learn's photograph of a temple: (427, 640), 0 black and 1 white, float64."""
    from sklearn.datasets import load_sample_image

    return torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64).mean(-1) / 255


def draw_pictures(figure: plt.Figure, pictures: Mapping[int, Tensor], numbers: int, columns: int) -> None:
    """Each rank's picture under a title: how many pieces, and which share of the original's ``numbers`` they take."""
    axes = figure.subplots(-(-len(pictures) // columns), columns, squeeze=False)
    for axis, (rank, picture) in zip(axes.flat, pictures.items(), strict=True):
        percent = 100 * rank * (sum(picture.shape) + 1) / numbers
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{rank} piece{'s' * (rank > 1)}, {percent:{'.2g' if percent < 10 else '.0f'}} % of the numbers", fontsize=10)
        axis.axis("off")


def draw_rivals(axis: plt.Axes, ranks: Sequence[int], errors: Mapping[str, Sequence[float]], least: Sequence[float]) -> None:
    """Relative errors at each rank, of other ways to a matrix of that rank and, in black, of the SVD."""
    for label, found in errors.items():
        axis.plot(ranks, found, "o-", ms=4, label=label)
    axis.plot(ranks, least, "o-", ms=4, label="SVD", color=plotting.BLACK)
    axis.set(yscale="log", xlabel="rank r", ylabel="relative error ‖W − X‖ / ‖W‖")
    log_ticks(axis, ranks)
    axis.legend()


def photograph_data() -> dict:
    return {"pieces": PIECES, "singular_values": torch.linalg.svdvals(photograph()).tolist()}


def draw_photograph(data: dict) -> plt.Figure:
    image = photograph()
    u, s, vh = torch.linalg.svd(image, full_matrices=False)
    figure = plt.figure(figsize=(9, 2.4))
    draw_pictures(figure, {rank: (u[:, :rank] * s[:rank]) @ vh[:rank] for rank in data["pieces"]}, image.numel(), columns=3)
    return figure


# Spectra


def draw_spectra(axis: plt.Axes, lines: Mapping[str, tuple[str, list[tuple[Sequence[int], Tensor]]]], title: str) -> None:
    """Singular values over the largest one: label -> its colour, and a line for each (i, σ)."""
    for label, (colour, spectra) in lines.items():
        for number, (i, values) in enumerate(spectra):
            axis.plot(i, values / values[0], color=colour, lw=1.3, label=None if number else label)
    axis.set(title=title, xlabel="i", ylabel="σᵢ / σ₁", yscale="log")


SHOWN = ("q_proj", "up_proj")


def spectra_data() -> dict:
    gemma = recorded.load("gemma_spectra", device="h100")["result"]
    found = {}
    for kind in SHOWN:
        of_kind = {what: [one for name, one in gemma[what].items() if name.endswith(kind)] for what in ("weights", "updates")}
        shape = of_kind["weights"][0]["shape"]
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        at = gemma["positions"][str(min(shape))]
        found[kind] = {what: [one["singular_values"] for one in ones] for what, ones in of_kind.items()}
        found[kind] |= {"positions": at, "noise": [torch.linalg.svdvals(noise)[at].tolist()], "shape": shape}
    return found


def draw_gemma_spectra(data: dict) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    looks = {"noise": ("noise", NOISE), "weights": ("weights W", WEIGHT), "updates": ("change ΔW", UPDATE)}
    for axis, (kind, found) in zip(axes, data.items(), strict=True):
        i = [position + 1 for position in found["positions"]]
        lines = {label: (colour, [(i, torch.tensor(values)) for values in found[what]]) for what, (label, colour) in looks.items()}
        draw_spectra(axis, lines, f"{kind}, {found['shape'][0]:,} × {found['shape'][1]}")
    axes[1].set_ylabel("")
    axes[0].legend(loc="lower left")
    return figure


# What a cut change still knows


def draw_cut(axis: plt.Axes, ranks: Sequence[int], change: Sequence[Sequence[float]], weights: Sequence[float], start: float) -> None:
    """Losses of the tiny model: clinic notes with ΔW cut to each rank (a row for each seed), general text with W cut."""
    plotting.with_spread(axis, ranks, change, "ΔW cut: clinic notes", color=UPDATE, marker="D", ms=4)
    axis.plot(ranks, weights, "o-", ms=4, color=WEIGHT, label="W cut: general text")
    axis.axhline(start, color=plotting.BLACK, ls=":", lw=1, label="clinic notes before fine-tuning")
    axis.set(yscale="log", ylim=(2e-3, 12), xlabel="rank r", ylabel="nats per token above the floor", title="Tiny model, 128 wide")
    log_ticks(axis, ranks)
    axis.legend(fontsize=9, loc="lower left")


def draw_kept(axis: plt.Axes, gain: Mapping[int, float], energy: Mapping[int, float]) -> None:
    """Gemma 3 270M, updates cut to each rank: percent of the gain on held-out code, and of the updates' energy."""
    axis.plot(list(gain), list(gain.values()), "D-", ms=4, color=UPDATE, label="of the gain on held-out code")
    axis.plot(list(energy), list(energy.values()), "s--", ms=4, color=plotting.BLACK, label="of the energy of ΔW")
    axis.set(ylim=(0, 103), xlabel="rank r", ylabel="kept, %", title="Gemma 3 270M, 640 wide")
    log_ticks(axis, (1, 4, 16, 64, 256))
    axis.legend(fontsize=9, loc="lower right")


def gemma_kept() -> dict[str, dict[int, float]]:
    """rank -> percent that is kept, of the "gain" and of the "energy" (mean over layers)."""
    gemma = recorded.load("gemma_spectra", device="h100")["result"]
    before, after = gemma["loss_before"], gemma["loss_after_full"]
    updates = gemma["updates"].values()
    return {
        "gain": {row["rank"]: 100 * (before - row["loss"]) / (before - after) for row in gemma["retained"] if row["rank"]},
        "energy": {int(rank): 100 * statistics.fmean(one["energy"][rank] for one in updates) for rank in next(iter(updates))["energy"]},
    }


def gain_data() -> dict:
    tiny = recorded.load("update_rank", device="cpu")["result"]
    start = statistics.fmean(before for before, _ in tiny["loss"]["clinic"])
    cut = {"ranks": tiny["ranks"][1:], "change": [run[1:] for run in tiny["retained"]["clinic"]], "start": start}
    return {"tiny": cut | {"weights": tiny["weights_truncated"]["loss_on_general"]}, "gemma": gemma_kept()}


def draw_gain(data: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7))
    draw_cut(left, **data["tiny"])
    draw_kept(right, **data["gemma"])
    return figure


# Where the rank comes from


def draw_along(axes: Sequence[plt.Axes], along: Mapping) -> None:
    """The tiny model on clinic notes: effective rank of ΔW and loss as training goes on, a band over the seeds."""
    for label, runs in along["runs"].items():
        for axis, values in zip(axes, (runs["share"], runs["loss"]), strict=True):
            plotting.with_spread(axis, along["steps"], values, label, marker="o", ms=4)
    for axis in axes:
        log_ticks(axis, along["steps"])
    axes[0].set(xlabel="steps", ylabel="effective rank of ΔW / n", ylim=(0, 0.65))
    axes[1].set(xlabel="steps", ylabel="nats per token above the floor", yscale="log")
    axes[0].legend(fontsize=9, loc="lower right")


# Random subspaces


def draw_digits(axis: plt.Axes, digits: Mapping[str, Mapping]) -> None:
    """Accuracy in a random subspace over that of full training, for each width of the network."""
    for width, runs in digits.items():
        relative = torch.tensor(list(runs["subspace"].values())).T / torch.tensor(runs["full"])[:, None]
        label = f"width {width}: {runs['parameters']:,} parameters"
        plotting.with_spread(axis, [int(d) for d in runs["subspace"]], relative, label, marker="o", ms=4)
    axis.axhline(0.9, color=plotting.BLACK, linestyle=":", linewidth=1)
    axis.set(xlabel="trained numbers d", ylabel="accuracy / full accuracy", title="Handwritten digits")
    log_ticks(axis, (20, 40, 80, 160, 480))
    axis.legend(fontsize=9, loc="lower right")


def draw_subspaces(axis: plt.Axes, shares: Mapping[str, Sequence[float]]) -> None:
    """The tiny model's share of full fine-tuning's gain in a random subspace of d dimensions, a band over the seeds."""
    values = torch.tensor(list(shares.values())).T
    plotting.with_spread(axis, [int(d) for d in shares], 100 * values, "tiny model", color=UPDATE, marker="D", ms=4)
    axis.axhline(90, color=plotting.BLACK, linestyle=":", linewidth=1)
    axis.set(xlabel="trained numbers d", ylabel="share of the gain, %", ylim=(0, 103), title="Tiny model, clinic notes")
    log_ticks(axis, (100, 300, 1000, 3000, 10000))


FIGURES = [
    Figure("svd_photograph", LESSON, photograph_data, draw_photograph),
    Figure("svd_spectra", LESSON, spectra_data, draw_gemma_spectra),
    Figure("svd_gain", LESSON, gain_data, draw_gain),
]
