"""The figure of the appendix on several GPUs: what a card holds and what it receives, as cards are added."""

import matplotlib.pyplot as plt

from course.claims import sharding
from course.figures import Figure
from course.lab import plotting

MODEL, CARDS = "Llama-2-70B", (1, 2, 4, 8)
ENGINES = {"tensor": plotting.RED, "FSDP": plotting.BLUE, "DDP": plotting.GREEN, "pipeline": plotting.ORANGE}


def cost() -> dict:
    held = {
        "weights": [sharding.on_a_card(MODEL, cards) for cards in CARDS],
        "adapters, Adam": [sharding.on_a_card(MODEL, cards, "adapters") for cards in CARDS],
        "gathered": [sharding.on_a_card(MODEL, cards, "gathered") if cards > 1 else 0.0 for cards in CARDS],
        "activations, loss": [sharding.rest_gb(MODEL)] * len(CARDS),
    }
    return {"held": held, "received": {engine: [sharding.received(MODEL, cards, engine) for cards in CARDS[1:]] for engine in ENGINES}}


def draw_cost(data: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.7))
    names = [str(cards) for cards in CARDS]
    colours = [plotting.BLUE, plotting.SKY, plotting.GREEN, plotting.ORANGE]
    heights = plotting.stacked(left, names, data["held"], colours=colours, width=0.62)
    for place, height in enumerate(heights):
        left.text(place, height + 0.5, f"{height:.0f}", ha="center", va="bottom")
    left.axhline(24, color=plotting.BLACK, linestyle=":", linewidth=1)
    left.text(len(CARDS) - 0.55, 24.3, "24 GB", ha="right", va="bottom", fontsize=9)
    left.set(xlabel="cards", ylabel="GB on each card", title=f"{MODEL}, sharded: fullest moment of a step", ylim=(0, 49))
    left.grid(axis="x", visible=False)
    left.legend()
    for engine, colour in ENGINES.items():
        found = data["received"][engine]
        right.plot(CARDS[1:], found, color=colour, marker="o")
        right.annotate(engine, (CARDS[-1], found[-1]), (7, 0), textcoords="offset points", color=colour, va="center")
    right.set(xscale="log", yscale="log", xlim=(1.8, 13), title="Between cards, in one step")
    right.set(xlabel="cards", ylabel="GB received by a card")
    right.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    right.set_xticks(CARDS[1:], names[1:])
    right.minorticks_off()
    return figure


FIGURES = [Figure("sharding_cost", "lessons/appendix/14_sharding.md", cost, draw_cost)]
