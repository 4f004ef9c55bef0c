"""Draws `bipartite.png`: two segments of tokens, a bank of states, and what runs between them."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch

INK, TOKEN, STATE, TALK = "#22303c", "#4c8dae", "#d9822b", "#8a6fb0"


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(11, 4.6), dpi=150)
    rng = np.random.default_rng(4)
    num_states, segment = 4, 5
    for step, left in enumerate((0.0, 6.4)):
        token_x = left + np.arange(segment) * 0.95
        state_x = left + 0.25 + np.arange(num_states) * 1.1
        weights = rng.dirichlet(np.full(num_states, 0.55), size=segment)
        for i, x in enumerate(token_x):
            for j, y in enumerate(state_x):
                strength = weights[i, j]
                axes.plot(
                    [x, y],
                    [0.12, 1.78],
                    color=TOKEN,
                    linewidth=0.5 + 3.2 * strength,
                    alpha=0.18 + 0.75 * strength,
                    zorder=1,
                    solid_capstyle="round",
                )
        for j in range(num_states):
            k = (j + 1) % num_states
            bend = -0.42 if k > j else 0.30
            axes.add_patch(
                FancyArrowPatch(
                    (state_x[j], 1.98),
                    (state_x[k], 1.98),
                    connectionstyle=f"arc3,rad={bend}",
                    arrowstyle="<|-|>",
                    mutation_scale=9,
                    color=TALK,
                    linewidth=1.3,
                    zorder=2,
                )
            )
        axes.scatter(token_x, np.zeros(segment), s=430, c=TOKEN, zorder=3, ec="white")
        axes.scatter(state_x, np.full(num_states, 1.9), s=560, c=STATE, zorder=3, ec="white")
        for i, x in enumerate(token_x):
            label = f"$x_{{{step * segment + i}}}$"
            axes.text(x, 0, label, ha="center", va="center", color="white", fontsize=11)
        for j, x in enumerate(state_x):
            axes.text(x, 1.9, f"$s_{j}$", ha="center", va="center", color="white", fontsize=12)
        axes.text(token_x.mean(), -0.55, f"segment {step}", ha="center", color=INK, fontsize=11)
    axes.add_patch(
        FancyArrowPatch(
            (4.05, 1.9),
            (6.2, 1.9),
            arrowstyle="-|>",
            mutation_scale=18,
            color=STATE,
            linewidth=2.2,
        )
    )
    notes = [
        (5.12, 2.03, "gates carry\nthe states on", INK),
        (5.15, 0.92, "routing and attention:\nedges token → state", TOKEN),
        (1.9, 2.72, "communication over any topology", TALK),
        (8.3, 2.72, "here: a ring of states", TALK),
    ]
    for x, y, text, color in notes:
        axes.text(x, y, text, ha="center", va="bottom", fontsize=10, color=color)
    axes.set_xlim(-0.6, 10.8)
    axes.set_ylim(-0.75, 2.95)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).with_name("bipartite.png"))
