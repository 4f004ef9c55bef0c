r"""What a loaded dataset is: three splits, and the sizes that a model needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch_geometric.data import Data

Task = Literal["classification", "regression", "token_classification", "next_token"]


@dataclass(frozen=True)
class DatasetInfo:
    r"""The sizes of a dataset, enough to build a model for it.

    Args:
        name: Name of the dataset.
        task: What is predicted, per example or per token.
        in_channels: Continuous channels of a token, or its number of symbol columns.
        num_embeddings: Number of symbols (one a column); :obj:`None` for continuous tokens.
        out_channels: Classes, regression targets, or symbols to predict.
        edge_embeddings: Number of edge symbols; :obj:`None` if edges carry none.
        edge_channels: Continuous channels of an edge; :obj:`None` if edges carry none.
        pe_channels: Channels of :obj:`data.pe`; :obj:`None` if there is none.
        symbols: The character of each symbol (text only).
        is_causal: Whether the label of a token depends on it and on earlier tokens only.
    """

    name: str
    task: Task
    in_channels: int
    num_embeddings: int | list[int] | None
    out_channels: int
    edge_embeddings: int | None = None
    edge_channels: int | None = None
    pe_channels: int | None = None
    symbols: list[str] | None = None
    is_causal: bool = False


@dataclass(frozen=True)
class Splits:
    r"""Train, validation and test examples, disjoint, and the sizes they share."""

    train: Sequence[Data]
    validation: Sequence[Data]
    test: Sequence[Data]
    info: DatasetInfo
