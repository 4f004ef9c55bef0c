r"""Parity: has there been an odd number of ones?"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator

from nsm_graph.data.tasks.base import Examples, StreamedTask, block_sizes


@dataclass(frozen=True)
class Parity(StreamedTask):
    r"""Fair bits; the label of each is the parity of all bits up to it.

    .. math::
        y_t = (x_0 + \dots + x_t) \bmod 2

    Source: the parity check of Delétang et al., Neural Networks and the Chomsky Hierarchy, 2022,
    ``tasks/regular/parity_check.py``. Differs: a label at every token instead of one for the
    sequence; the last label is theirs.

    Example:
        >>> x, y = Parity().sample(1, 5, torch.Generator().manual_seed(0))
        >>> x, y
        (tensor([[0, 1, 1, 0, 1]]), tensor([[0, 1, 0, 0, 1]]))
    """

    name = "parity"
    num_symbols = 2
    num_classes = 2
    min_length = 1

    def _blocks(self, num_examples: int, length: int, generator: Generator) -> Iterator[Examples]:
        parity = torch.zeros(num_examples, 1, dtype=torch.long)
        for size in block_sizes(length):
            x = torch.randint(2, (num_examples, size), generator=generator)
            y = (parity + x.cumsum(dim=1)) % 2
            parity = y[:, -1:]
            yield x, y
