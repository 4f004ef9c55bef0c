r"""Positional encodings of graphs, from PyG's own transforms, in :obj:`data.pe`."""

import torch
from torch.nn.functional import pad
from torch_geometric.data import Data
from torch_geometric.transforms import (
    AddLaplacianEigenvectorPE,
    AddRandomWalkPE,
    BaseTransform,
)

from nsm_graph.data.stratify import random_state

KINDS = ("random_walk", "laplacian")


class AddPositionalEncoding(BaseTransform):
    r"""Adds a positional encoding of every node as :obj:`data.pe`.

    Differs from PyG: graphs with too few nodes get zeros in the missing channels, and the result
    does not depend on (or advance) the global random generators.

    Args:
        kind: ``"random_walk"`` (return probabilities after 1, 2, ... steps) or ``"laplacian"``
            (eigenvectors of the smallest non-trivial eigenvalues; their signs are arbitrary).
        channels: Number of steps, or of eigenvectors.

    Shapes:
        - **output:** :obj:`data.pe` float :math:`(N, channels)`

    Raises:
        ValueError: If the kind is unknown or there are no channels.
        ImportError: If ``"laplacian"`` is asked for and SciPy is not installed.
    """

    def __init__(self, kind: str, channels: int) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown pe {kind!r}; choose one of {', '.join(KINDS)}, or None")
        if channels < 1:
            raise ValueError(f"pe_channels is {channels}; it must be at least 1")
        if kind == "laplacian":
            try:
                import scipy.sparse.linalg  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    "pe='laplacian' needs SciPy, which is not installed; run: pip install scipy"
                ) from error
        self.kind = kind
        self.channels = channels

    def forward(self, data: Data) -> Data:
        if self.kind == "random_walk":
            return AddRandomWalkPE(self.channels, attr_name="pe")(data)
        return self._laplacian(data)

    def _laplacian(self, data: Data) -> Data:
        # N nodes have N - 1 non-trivial eigenvectors.
        num_nodes = data.num_nodes
        known = min(self.channels, num_nodes - 1)
        if known < 1:
            data.pe = torch.zeros(num_nodes, self.channels)
            return data
        options = {}
        if num_nodes >= AddLaplacianEigenvectorPE.SPARSE_THRESHOLD:
            # The iterative solver starts from a random vector unless it is given one.
            options["v0"] = random_state(0).standard_normal(num_nodes)
        transform = AddLaplacianEigenvectorPE(
            known, attr_name="pe", is_undirected=data.is_undirected(), **options
        )
        # The iterative solver finds fewer vectors than there are nodes; else solve densely.
        transform.SPARSE_THRESHOLD = max(transform.SPARSE_THRESHOLD, self.channels + 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # PyG draws the signs
            data = transform(data)
        data.pe = pad(data.pe.float(), (0, self.channels - known))
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind!r}, {self.channels})"


def positional_transform(pe: str | None, pe_channels: int | None) -> AddPositionalEncoding | None:
    r"""The transform for the options :obj:`pe` and :obj:`pe_channels`, which go together."""
    if pe is None and pe_channels is None:
        return None
    if pe is None or pe_channels is None:
        raise ValueError(
            f"pe is {pe!r} and pe_channels is {pe_channels}; give both, or neither for no encoding"
        )
    return AddPositionalEncoding(pe, pe_channels)
