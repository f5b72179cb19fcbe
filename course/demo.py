"""``course demo``: four things worth seeing before the first lesson, in under a minute, in a terminal and as one figure."""

import contextlib
import io
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from course import ROOT
from course.lab import models, plotting, seed_everything
from course.lab.training import above_floor, fact_accuracy, train
from course.lab.world import World
from reference.lora import LoRALinear, inject_lora, trainable_parameters
from reference.lowrank import energy_captured, truncated_svd

FIGURE = ROOT / "build" / "demo.png"
RANKS = (1, 5, 20)
STEPS, ROWS, LENGTH, SEEDS = 60, 8, 40, (0, 1, 2)


def picture() -> Tensor:
    """A grey photograph that ships with scikit-learn, every fourth pixel: (height, width) in 0 … 1."""
    from sklearn.datasets import load_sample_image

    return torch.tensor(load_sample_image("china.jpg")[::4, ::4].mean(-1) / 255, dtype=torch.float32)


def low_rank_pictures() -> dict[str, Tensor]:
    """The photograph rebuilt from few singular values, titled with what it costs and keeps."""
    image = picture()
    values, (height, width) = torch.linalg.svdvals(image), image.shape
    shown = {}
    for rank in RANKS:
        B, A = truncated_svd(image, rank)
        share = rank * (height + width) / image.numel()
        shown[f"rank {rank}: {share:.0%} of the numbers,\n{energy_captured(values, rank):.1%} of the energy"] = (B @ A).clamp(0, 1)
    return shown | {f"all {min(height, width)} ranks\n{height} × {width} pixels": image}


def layer_learning() -> tuple[dict[str, list[float]], dict[str, float]]:
    """How far a LoRA layer still is from a change of rank 8 after each step, and the least that each rank can reach.

    Both are ‖s·B·A − ΔW‖² / ‖ΔW‖², the expected squared error on white inputs as a share of that at the start.
    """
    curves, limits = {}, {}
    for r in (1, 4, 8):
        seed_everything(0)
        base = torch.nn.Linear(64, 64, bias=False)
        change = torch.randn(64, 8) @ torch.randn(8, 64) / 64
        layer = LoRALinear(base, r=r, lora_alpha=2 * r)
        target, optimizer = base.weight.detach() + change, torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.01)
        curves[f"r = {r}"] = errors = []
        limits[f"r = {r}"] = 1 - energy_captured(torch.linalg.svdvals(change), r)  # Eckart and Young
        for _ in range(400):
            errors.append(((layer.delta_weight() - change).square().sum() / change.square().sum()).item())
            x = torch.randn(256, 64)
            loss = (layer(x) - x @ target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return curves, limits


def parameter_counts() -> list[tuple[str, int, int]]:
    """(method, trainable parameters, bytes of Adam's two float32 moments) for the tiny model."""
    rows = []
    for label, arguments in (
        ("full fine-tuning", None),
        ("LoRA, r = 16, every linear", {"r": 16, "lora_alpha": 32}),
        ("LoRA, r = 4, queries and values", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    ):
        model, _ = models.load("tiny")
        if arguments:
            inject_lora(model, **arguments)
        trainable = trainable_parameters(model)[0]
        rows.append((label, trainable, 8 * trainable))
    return rows


def forgetting() -> dict[str, dict[str, list[float]]]:
    """Teach clinic notes to the tiny model in two ways; what it learned and what it lost, a value a seed, with the start under "before"."""
    world, found = World(), {}
    for method, lr in (("before", 0.0), ("full fine-tuning", 2e-3), ("LoRA, r = 4", 5e-3)):
        found[method] = {"clinic": [], "general": [], "facts": []}
        for seed in SEEDS if lr else (0,):
            seed_everything(seed)
            model, _ = models.load("tiny", where=torch.device("cpu"))
            if method.startswith("LoRA"):
                inject_lora(model, r=4, lora_alpha=8)
            if lr:
                train(model, lambda step, seed=seed: world.sample("clinic", ROWS, LENGTH, 1000 * seed + step), STEPS, lr, progress=False)
            for domain in ("clinic", "general"):
                found[method][domain].append(above_floor(model, world, domain))
            found[method]["facts"].append(fact_accuracy(model, world))
    return found


def spread(values: list[float], form: str) -> str:
    """Mean, and lowest to highest where there are several seeds."""
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}}–{max(values):{form}})"


def in_terminal(image: Tensor, width: int = 34) -> Text:
    """A grey image as half blocks, two pixels a character."""
    height = 2 * round(width * image.shape[0] / image.shape[1] / 2)
    small = torch.nn.functional.interpolate(image[None, None], size=(height, width), mode="area")[0, 0]
    grey = (255 * small).round().int().tolist()
    text = Text()
    for upper, lower in zip(grey[::2], grey[1::2], strict=True):
        for a, b in zip(upper, lower, strict=True):
            text.append("▀", style=f"rgb({a},{a},{a}) on rgb({b},{b},{b})")
        text.append("\n")
    return text


def draw(pictures, curves, counts, lost) -> plt.Figure:
    """The whole demo as one figure."""
    figure = plt.figure(figsize=(10.5, 6.2))
    rows = figure.subfigures(2, 1, height_ratios=(1, 1.65))
    for axes, (title, image) in zip(rows[0].subplots(1, len(pictures)), pictures.items(), strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    left, middle, right = rows[1].subplots(1, 3)
    for label, errors in curves.items():
        left.plot(errors, label=label)
    left.set(title="A LoRA layer learns a change of rank 8", xlabel="step", ylabel="squared error, share of the start", ylim=(0, 1.05))
    left.legend()
    names = [label.replace(", ", ",\n") for label, _, _ in counts]
    bars = middle.barh(names, [count for _, count, _ in counts], color=plotting.COLOURS[:3])
    middle.bar_label(bars, [f"{count:,}" for _, count, _ in counts], padding=3)
    middle.set(title="Trainable parameters", xlabel="million parameters", xlim=(0, 1.45 * counts[0][1]))
    middle.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    middle.invert_yaxis()
    methods = list(lost)
    for offset, (domain, colour) in enumerate((("clinic", plotting.BLUE), ("general", plotting.ORANGE))):
        values = [np.array(lost[method][domain]) for method in methods]
        means = np.array([seeds.mean() for seeds in values])
        ends = [means - [seeds.min() for seeds in values], [seeds.max() for seeds in values] - means]
        label = "clinic notes (new)" if domain == "clinic" else "general (known before)"
        right.bar(np.arange(len(methods)) + 0.38 * offset - 0.19, means, 0.36, yerr=ends, capsize=3, color=colour, label=label)
    right.set_xticks(range(len(methods)), [method.replace(" ", "\n", 1) for method in methods])
    right.set(title="Learning one thing, forgetting another", ylabel="loss above the floor, nats per token")
    right.set_ylim(top=1.3 * right.get_ylim()[1])  # room for the legend above the bars
    right.legend(fontsize=8, loc="upper right")
    return figure


def main(figure: Path | None = None, console: Console | None = None) -> Path:
    """Run the demo, print it, save it as one figure, and return that file's path."""
    console, started, path = console or Console(), time.perf_counter(), Path(figure or FIGURE)
    plotting.use_style()

    pictures = low_rank_pictures()
    panels = [Group(in_terminal(image), Text(title, style="dim")) for title, image in pictures.items()]
    console.print(Panel(Columns(panels, padding=(0, 2)), title="1. Few singular values hold most of a picture", border_style="blue"))

    curves, limits = layer_learning()
    table = Table("rank of the adapter", "error at the start", "after 100 steps", "after 400 steps", "least for this rank", box=None)
    for label, errors in curves.items():
        cells = [errors[0], errors[100], errors[-1], limits[label]]
        table.add_row(label, *(f"{cell:.2g}" if cell > 1e-9 else "0" for cell in cells))  # below: rounding
    console.print(Panel(table, title="2. A LoRA layer learns a change of rank 8, as far as its own rank allows", border_style="blue"))

    counts = parameter_counts()
    table = Table("tiny model (Llama shape)", "trainable parameters", "share", "Adam's moments", box=None)
    for label, count, moments in counts:
        table.add_row(label, f"{count:,}", f"{count / counts[0][1]:.1%}", f"{moments / 1e6:.2f} MB")
    console.print(Panel(table, title="3. What has to be trained", border_style="blue"))

    with console.status("teaching clinic notes to the tiny model, two ways, three seeds"), contextlib.redirect_stderr(io.StringIO()):
        lost = forgetting()
    table = Table("nats above the floor", "clinic notes (new)", "general (known)", "facts known", box=None)
    for method, values in lost.items():
        table.add_row(method, spread(values["clinic"], ".2f"), spread(values["general"], ".2f"), spread(values["facts"], ".0%"))
    console.print(Panel(table, title="4. Learning one thing, forgetting another (three seeds)", border_style="blue"))

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(pictures, curves, counts, lost)
    drawn.savefig(path, bbox_inches="tight")
    plt.close(drawn)
    console.print(f"{time.perf_counter() - started:.0f} s. The figure is at {path}. Next: make lab")
    return path
