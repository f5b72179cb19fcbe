"""One look for every figure: colours that colour-blind readers can tell apart, a caption, and a text for those who can't see it."""

import io

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import Markdown, display
from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), in an order that keeps neighbours apart; yellow is left out: too faint on white.
BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#222222"
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK]
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"

STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "font.size": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (7.2, 3.6),
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "image.cmap": SEQUENTIAL,
}


def use_style() -> None:
    """Give every figure of this process the course's look."""
    plt.rcParams.update(STYLE)


def show(figure: Figure, caption: str, alt: str) -> None:
    """Display ``figure`` with its caption below and ``alt`` for screen readers, then close it.

    Args:
        caption: what to see in the figure, one or two sentences.
        alt: what the figure shows, for somebody who can't see it.
    """
    if not caption.strip() or not alt.strip():
        raise ValueError("a figure needs a caption that says what to see and an alt text that says what is shown")
    display({"image/png": png(figure), "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})
    display(Markdown(f"*{caption}*"))


def png(figure: Figure) -> bytes:
    """``figure`` as the bytes of a PNG, for the value of an ``ipywidgets.Image``; the figure is closed."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    plt.close(figure)
    return picture.getvalue()


def with_spread(axes, x, runs, label: str, **style) -> None:
    """Draw the mean of ``runs`` (seeds × points) over ``x`` with a band from the lowest to the highest seed."""
    import numpy as np

    runs = np.asarray(runs, dtype=float)
    (line,) = axes.plot(x, runs.mean(0), label=label, **style)
    axes.fill_between(x, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.18, linewidth=0)


def stacked(axes, names, parts, horizontal: bool = False, colours=COLOURS, **style):
    """Draw a bar for each of ``names``, made of ``parts``: label -> a number for each name. Returns the bars' lengths."""
    import numpy as np

    if len(parts) > len(colours):
        raise ValueError(f"parts has {len(parts)} entries, but there are {len(colours)} colours: give more colours, or join parts")
    draw, start = (axes.barh, "left") if horizontal else (axes.bar, "bottom")
    total = np.zeros(len(names))
    for (label, numbers), colour in zip(parts.items(), colours, strict=False):
        draw(names, numbers, label=label, color=colour, **{start: total}, **style)
        total = total + np.asarray(numbers, dtype=float)
    # A last part of no length would pin the axis to the end of the bars.
    (axes.set_xlim if horizontal else axes.set_ylim)(0, 1.05 * total.max())
    if horizontal:
        axes.invert_yaxis()
    return total
