r"""Induction heads: what followed the special token the first time?"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator

from nsm_graph.data.tasks.base import IGNORED, Examples, StreamedTask, block_sizes
from nsm_graph.data.tasks.checks import check_at_least


@dataclass(frozen=True)
class Induction(StreamedTask):
    r"""Uniform tokens with one special token among them, which comes again at the end.

    The special token is the last symbol. It stands at a place drawn uniformly from
    :math:`0, \dots, L - 3` and at the end, nowhere else; the only label stands at the end: the
    token that follows the special token at its first place. All other tokens are uniform among the
    other symbols.

    Source: induction heads of Gu and Dao, Mamba, 2023 (16 symbols; trained on 256 tokens, tested up
    to 1,048,576), after Dao et al., H3, 2023, HazyResearch/safari,
    ``src/dataloaders/synthetics.py``. Differs from safari: tokens before the end have no label,
    also in training; only one symbol is reserved, so that 15 can be asked; the first place may
    be so late that its answer stands right before the end.

    Args:
        vocab_size: Symbols, the special one among them.  (default: :obj:`16`)

    Raises:
        ValueError: If :obj:`vocab_size` is below 3.

    Example:
        >>> x, y = Induction().sample(1, 8, torch.Generator().manual_seed(0))
        >>> x
        tensor([[ 9,  8, 15, 13,  9,  7, 13, 15]])
        >>> y
        tensor([[-100, -100, -100, -100, -100, -100, -100,   13]])
    """

    vocab_size: int = 16
    name = "induction"
    min_length = 3

    def __post_init__(self) -> None:
        check_at_least(self.name, "vocab_size", self.vocab_size, 3)

    @property
    def num_symbols(self) -> int:
        return self.vocab_size

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def chance(self) -> float:
        """One ordinary symbol among all."""
        return 1 / (self.vocab_size - 1)

    def _blocks(self, num_examples: int, length: int, generator: Generator) -> Iterator[Examples]:
        special = self.vocab_size - 1
        place = torch.randint(length - 2, (num_examples, 1), generator=generator)
        answer = torch.zeros(num_examples, 1, dtype=torch.long)
        start = 0
        for size in block_sizes(length):
            x = torch.randint(special, (num_examples, size), generator=generator)
            position = torch.arange(start, start + size)
            # The answer may be in the block after the special token's.
            answer += (x * (position == place + 1)).sum(dim=1, keepdim=True)
            x[position == place] = special
            start += size
            y = torch.full_like(x, IGNORED)
            if start == length:
                x[:, -1:] = special
                y[:, -1:] = answer
            yield x, y
