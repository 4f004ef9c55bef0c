"""The mini-batches of a split: PyG's loader, parallel streams of text, shifted images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from nsm_graph.data import CharacterStreams, DatasetInfo, TaskSequences
from nsm_graph.training.config import Config
from nsm_graph.training.curriculum import FreshSequences

CHUNK_LENGTH = 256


def batches(
    config: Config, info: DatasetInfo, split: Sequence[Data], order: torch.Generator | None = None
) -> DataLoader | CharacterStreams | FreshSequences:
    """Batches of a split, in random order if a generator is given; text is read in its own order,
    and the training sequences of a task are made anew.

    The streams of a text are the examples of a batch; a short text has fewer of them.
    """
    size = config.train.batch_size
    if info.task == "next_token":
        length = config.data.chunk_length or CHUNK_LENGTH
        streams = max(1, min(size, split[0].num_nodes // length))
        return CharacterStreams(split[0], streams, length)
    if isinstance(split, TaskSequences) and order is not None:
        return FreshSequences(
            split,
            size,
            order,
            min_length=config.train.min_length,
            curriculum=config.train.curriculum,
        )
    return DataLoader(split, batch_size=size, shuffle=order is not None, generator=order)


def truncate(data: Data, length: int, info: DatasetInfo) -> Data:
    """The first `length` tokens of a sequence, with their labels."""
    if data.get("edge_index") is not None:
        raise ValueError("--length: expected sequences; got graphs, whose nodes have no order")
    is_per_token = info.task in ("token_classification", "next_token")
    x, y = data.x[:length], data.y[:length] if is_per_token else data.y
    return Data(x=x, y=y, num_nodes=x.size(0))


def shift_images(batch: Data, generator: torch.Generator) -> Data:
    """Moves every image by -1, 0 or 1 pixels each way; what comes in at the border is 0.

    Images are square, read row by row, one token a pixel.
    """
    size, pixels = batch.num_graphs, batch.x.size(0) // batch.num_graphs
    side = math.isqrt(pixels)
    if side * side != pixels or batch.x.size(0) != size * pixels:
        raise ValueError(
            f"data.augment: expected square images; got {batch.x.size(0)} pixels in {size} images"
        )
    image: Tensor = torch.nn.functional.pad(batch.x.view(size, side, side, -1), (0, 0, 1, 1, 1, 1))
    shift = torch.randint(3, (2, size, 1), generator=generator).to(image.device)
    row, column = shift + torch.arange(side, device=image.device)
    example = torch.arange(size, device=image.device).view(-1, 1, 1)
    batch.x = image[example, row.unsqueeze(2), column.unsqueeze(1)].reshape(batch.x.shape)
    return batch
