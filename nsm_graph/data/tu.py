r"""Graph classification sets of the TU Dortmund collection."""

from functools import partial
from pathlib import Path

import torch
from torch_geometric.data import Data
from torch_geometric.utils import degree, one_hot

from nsm_graph.data.cache import GraphFiles, prepare
from nsm_graph.data.folds import published_fold, stratified_fold
from nsm_graph.data.info import DatasetInfo, Splits
from nsm_graph.data.positional import positional_transform

PUBLISHER = "TUDataset collection, TU Dortmund, Morris et al."

# Nodes of a higher degree share the last column, or one hub would widen every node.
MAX_DEGREE = 255


def load_tu(
    *,
    root: Path,
    cache: Path,
    seed: int,
    dataset: str = "PROTEINS",
    splits: str | Path | None = None,
    fold: int = 0,
    num_folds: int = 10,
    node_features: str = "degree",
    use_node_attr: bool = False,
    use_edge_attr: bool = False,
    pe: str | None = None,
    pe_channels: int | None = None,
) -> Splits:
    r"""A TU set as PyG's :class:`~torch_geometric.datasets.TUDataset` has it.

    :obj:`x` is float ``[N, C]`` (one-hot node labels), :obj:`edge_attr` float (one-hot edge labels,
    where there are), :obj:`y` long ``[1]``.

    Args:
        dataset: Name of the set.  (default: :obj:`"PROTEINS"`)
        splits: JSON file of outer folds in the form of gnn-comparison; :obj:`None` for
            :obj:`num_folds` stratified folds drawn with :obj:`seed`.  (default: :obj:`None`)
        fold: The fold that is the test part.  (default: :obj:`0`)
        num_folds: Number of drawn folds; a tenth of what is not test is validation.
            (default: :obj:`10`)
        node_features: For sets whose nodes carry nothing, as IMDB-BINARY: ``"degree"`` (one-hot,
            degrees above 255 share a column) or ``"constant"``.  (default: :obj:`"degree"`)
        use_node_attr: Adds the continuous node attributes.  (default: :obj:`False`)
        use_edge_attr: Adds the continuous edge attributes.  (default: :obj:`False`)
        pe: ``"random_walk"``, ``"laplacian"`` or :obj:`None`.  (default: :obj:`None`)
        pe_channels: Channels of :obj:`data.pe`.  (default: :obj:`None`)
    """
    from torch_geometric.datasets import TUDataset

    if node_features not in ("degree", "constant"):
        raise ValueError(f"unknown node_features {node_features!r}; choose degree or constant")
    if not dataset or Path(dataset).name != dataset:
        raise ValueError(f"dataset is {dataset!r}; give the name of a TU set, e.g. 'PROTEINS'")
    transform = positional_transform(pe, pe_channels)
    files = tuple(f"{dataset}_{part}.txt" for part in ("A", "graph_indicator", "graph_labels"))
    source = GraphFiles(
        dataset, files, PUBLISHER, TUDataset, {"name": dataset}, dataset, partial(_check, dataset)
    )
    entry = prepare(source, root, cache, transform)
    loaded = source.open(entry, transform, use_node_attr=use_node_attr, use_edge_attr=use_edge_attr)
    graphs = _with_features([loaded.get(i) for i in range(len(loaded))], node_features)
    labels = torch.cat([graph.y for graph in graphs])
    if labels.is_floating_point():
        raise ValueError(f"{dataset} has regression targets; only sets with classes can be loaded")

    if splits is not None:
        train, validation, test = published_fold(Path(splits).expanduser(), fold, len(graphs))
    else:
        train, validation, test = stratified_fold(labels.numpy(), fold, num_folds, seed)
    first = graphs[0]
    info = DatasetInfo(
        dataset,
        "classification",
        first.x.size(1),
        None,
        int(labels.max()) + 1,
        edge_channels=None if first.edge_attr is None else first.edge_attr.size(1),
        pe_channels=pe_channels,
    )
    return Splits(
        train=[graphs[i] for i in train],
        validation=[graphs[i] for i in validation],
        test=[graphs[i] for i in test],
        info=info,
    )


def _with_features(graphs: list[Data], node_features: str) -> list[Data]:
    r"""Gives nodes without features some, and takes away edge features without columns."""
    if graphs[0].edge_attr is not None and graphs[0].edge_attr.size(1) == 0:
        for graph in graphs:
            del graph.edge_attr
    if graphs[0].x is not None and graphs[0].x.size(1) > 0:
        return graphs
    degrees = [degree(g.edge_index[0], g.num_nodes, torch.long) for g in graphs]
    degrees = [values.clamp(max=MAX_DEGREE) for values in degrees]
    width = 1 + max(int(d.max()) for d in degrees if d.numel())
    for graph, values in zip(graphs, degrees, strict=True):
        is_constant = node_features == "constant"
        graph.x = torch.ones(len(values), 1) if is_constant else one_hot(values, width)
    return graphs


def _check(name: str, raw: Path) -> None:
    r"""Compares the files' numbers of lines: PyG's reader would take short ones silently."""

    def num_lines(part: str) -> int:
        content = (raw / f"{name}_{part}.txt").read_bytes().rstrip()
        return content.count(b"\n") + bool(content)

    indicator = (raw / f"{name}_graph_indicator.txt").read_text().split()
    expected = {
        "graph_labels": int(indicator[-1]),
        "node_labels": len(indicator),
        "node_attributes": len(indicator),
        "edge_labels": num_lines("A"),
        "edge_attributes": num_lines("A"),
    }
    for part, count in expected.items():
        if (raw / f"{name}_{part}.txt").is_file() and num_lines(part) != count:
            raise ValueError(f"{name}_{part}.txt: expected {count} lines, got {num_lines(part)}")
