r"""ZINC-12k: molecules, and one number to predict."""

from pathlib import Path

from torch_geometric.data import Data

from nsm_graph.data.cache import GraphFiles, prepare
from nsm_graph.data.info import DatasetInfo, Splits
from nsm_graph.data.positional import positional_transform

FILES = tuple(f"{part}.{kind}" for kind in ("pickle", "index") for part in ("train", "val", "test"))
PUBLISHER = "ZINC subset of Benchmarking Graph Neural Networks, Dwivedi et al., as PyG's ZINC"

# The published coding: 28 atom types from 0, bond types 1 to 3 (0 would be "no bond").
NUM_ATOMS, NUM_BONDS = 28, 4


def load_zinc(
    *, root: Path, cache: Path, seed: int, pe: str | None = None, pe_channels: int | None = None
) -> Splits:
    r"""12,000 molecules with their constrained solubility: 10,000 / 1,000 / 1,000, as published.

    :obj:`x` is long ``[N]`` (atom types), :obj:`edge_attr` long ``[E]`` (bond types), :obj:`y`
    float ``[1, 1]``. :obj:`pe` is ``"random_walk"``, ``"laplacian"`` or :obj:`None`, with
    :obj:`pe_channels`. :obj:`seed` is not used.
    """
    from torch_geometric.datasets import ZINC

    transform = positional_transform(pe, pe_channels)
    source = GraphFiles("ZINC", FILES, PUBLISHER, ZINC, {"subset": True})
    entry = prepare(source, root, cache, transform)

    def read(split: str) -> list[Data]:
        graphs = source.open(entry, transform, split=split)
        return [_tidy(graphs.get(i)) for i in range(len(graphs))]

    info = DatasetInfo(
        "zinc", "regression", 1, NUM_ATOMS, 1, edge_embeddings=NUM_BONDS, pe_channels=pe_channels
    )
    return Splits(read("train"), read("val"), read("test"), info)


def _tidy(data: Data) -> Data:
    for name, values, count in (("atom", data.x, NUM_ATOMS), ("bond", data.edge_attr, NUM_BONDS)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
            raise ValueError(
                f"ZINC: expected {name} types 0 to {count - 1}, got {int(values.min())} to "
                f"{int(values.max())}; put the original files there"
            )
    data.x, data.y = data.x.flatten(), data.y.view(1, 1)
    return data
