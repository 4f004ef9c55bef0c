"""What a topology looks like on paper. Needs matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsm_graph.relation import Relation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYOUTS = ("circle", "line", "matrix")


def draw(
    relation: Relation,
    title: str = "",
    *,
    layout: str = "circle",
    positions: Tensor | None = None,
    ax: Axes | None = None,
    color: str = "tab:blue",
) -> Axes:
    """Draws the edges of a relation: nodes and lines, or the adjacency matrix.

    Edges that run one way have an arrow at their target; two node sets stand in two rows.

    Args:
        relation: What to draw.
        title: Stands above.
        layout: ``"circle"``, ``"line"`` or ``"matrix"``. (default: :obj:`"circle"`)
        positions: Where the nodes of one set stand, ``[N, 2]``; ``None`` for the layout's.
            (default: :obj:`None`)
        ax: Axes to draw into; ``None`` for new ones. (default: :obj:`None`)
        color: Of edges and nodes. (default: :obj:`"tab:blue"`)

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no such layout, or not one position per node.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'nsm-graph[report]'") from error
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, but is {layout!r}")
    if ax is None:
        _, ax = plt.subplots(figsize=(3, 3), layout="constrained")
    ax.set_title(title)
    if layout == "matrix":
        dense = torch.zeros(relation.num_dst, relation.num_src)
        dense[relation.edge_index[1].cpu(), relation.edge_index[0].cpu()] = 1
        ax.imshow(dense.numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set(xlabel="source", ylabel="target")
        return ax
    is_one_set = relation.sources is relation.targets
    if is_one_set:
        sources = targets = _places(relation.num_src, layout, positions)
    else:
        sources, targets = (_row(count, y) for count, y in zip(relation.size, (0, 1), strict=True))
    _draw_edges(ax, relation, sources, targets, is_one_set, color)
    for places in (sources,) if is_one_set else (sources, targets):
        ax.scatter(places[:, 0], places[:, 1], color=color, zorder=2)
    ax.set_aspect("equal" if is_one_set else "auto")
    ax.margins(0.1)
    ax.axis("off")
    return ax


def _draw_edges(
    ax: Axes, relation: Relation, sources: Tensor, targets: Tensor, is_one_set: bool, color: str
) -> None:
    from matplotlib.collections import LineCollection

    edges = set(map(tuple, relation.edge_index.T.tolist()))
    is_two_way = {(i, j) for i, j in edges if is_one_set and (j, i) in edges}
    lines = [
        (sources[i].tolist(), targets[j].tolist())
        for i, j in edges
        if i != j or not is_one_set
        if (i, j) not in is_two_way or i < j
    ]
    ax.add_collection(LineCollection(lines, colors=color, linewidths=0.8, alpha=0.5))
    for i, j in edges - is_two_way if is_one_set else ():
        ax.annotate(
            "", tuple(targets[j].tolist()), tuple(sources[i].tolist()),
            arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.5},
        )  # fmt: skip
    if is_one_set:
        loops = sources[[i for i, j in edges if i == j]]
        ax.scatter(loops[:, 0], loops[:, 1], s=120, facecolors="none", edgecolors=color, alpha=0.5)


def _places(num_nodes: int, layout: str, positions: Tensor | None) -> Tensor:
    if positions is not None:
        if positions.shape != (num_nodes, 2):
            raise ValueError(
                f"positions must have shape ({num_nodes}, 2), one point per node, but has "
                f"{tuple(positions.shape)}"
            )
        return positions
    if layout == "line":
        return _row(num_nodes, 0)
    angle = torch.arange(num_nodes) * (2 * math.pi / max(num_nodes, 1))
    return torch.stack([angle.sin(), angle.cos()], dim=1)


def _row(num_nodes: int, y: float) -> Tensor:
    x = (torch.arange(num_nodes) + 0.5) / max(num_nodes, 1)
    return torch.stack([x, torch.full_like(x, y)], dim=1)
