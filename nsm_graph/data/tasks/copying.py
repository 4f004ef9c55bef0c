r"""Copying: data tokens come back in order, after a wait or out of noise."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nsm_graph.data.tasks.base import IGNORED, Examples, SequenceTask
from nsm_graph.data.tasks.checks import check_at_least
from nsm_graph.data.tasks.draws import distinct

# Symbol 0 is the blank, or the noise; the marker is the last symbol.
BLANK = 0


@dataclass(frozen=True)
class _CopyTask(SequenceTask):
    """K data tokens that are asked in order at the last K tokens."""

    num_tokens: int
    vocab_size: int

    def __post_init__(self) -> None:
        check_at_least(self.name, "num_tokens", self.num_tokens, 1)
        check_at_least(self.name, "vocab_size", self.vocab_size, 3)

    @property
    def num_symbols(self) -> int:
        return self.vocab_size

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def chance(self) -> float:
        """One kind of data token among all."""
        return 1 / (self.vocab_size - 2)

    def _sample(self, num_examples: int, length: int, generator: Generator) -> Examples:
        shape = (num_examples, self.num_tokens)
        data = torch.randint(1, self.vocab_size - 1, shape, generator=generator)
        x = torch.full((num_examples, length), BLANK)
        y = torch.full_like(x, IGNORED)
        y[:, -self.num_tokens :] = data
        self._write(x, data, generator)
        return x, y

    @abstractmethod
    def _write(self, x: Tensor, data: Tensor, generator: Generator) -> None:
        """Writes data and markers over the blanks."""


@dataclass(frozen=True)
class Copy(_CopyTask):
    r"""K data tokens, blanks, a marker, then K blanks at which the data tokens are asked in order.

    Of :obj:`vocab_size` symbols 0 is the blank and the last is the marker; data tokens are uniform
    among the others. :obj:`length` counts all tokens: :math:`K + blanks + 1 + K`. Labels stand at
    the last K tokens.

    Source: the copying problem of Arjovsky, Shah and Bengio, Unitary Evolution RNNs, 2016 (10 data
    tokens of 8 kinds; a delay of T is :obj:`length` T + 20). Differs: nothing is asked
    before the marker, where the answer is a blank in the source; locuslab/TCN
    (``TCN/copy_memory/utils.py``) shows the marker, not blanks, while it asks.

    Args:
        num_tokens: Data tokens, K.  (default: :obj:`10`)
        vocab_size: Symbols, blank and marker among them.  (default: :obj:`10`)

    Raises:
        ValueError: If there is no data token, or no kind of it.

    Example:
        >>> task = Copy(num_tokens=3)
        >>> x, y = task.sample(1, 9, torch.Generator().manual_seed(0))
        >>> x
        tensor([[5, 8, 6, 0, 0, 9, 0, 0, 0]])
        >>> y
        tensor([[-100, -100, -100, -100, -100, -100,    5,    8,    6]])
    """

    num_tokens: int = 10
    vocab_size: int = 10
    name = "copy"

    @property
    def min_length(self) -> int:
        return 2 * self.num_tokens + 1

    def _write(self, x: Tensor, data: Tensor, generator: Generator) -> None:
        x[:, : self.num_tokens] = data
        x[:, -self.num_tokens - 1] = self.vocab_size - 1


@dataclass(frozen=True)
class SelectiveCopy(_CopyTask):
    r"""K data tokens at random places of a noisy context, then K markers that ask for them.

    The context is :math:`L - K` tokens: noise, symbol 0, and the data tokens at places drawn
    uniformly without replacement. Then the marker, the last symbol, stands K times; the label of
    the k-th is the k-th data token of the context. Data tokens are uniform among the other
    symbols.

    :obj:`length` counts all tokens. The published setting is a context of 4,096 tokens with 16 data
    tokens: :obj:`length` 4112. A shorter length has the same data tokens in less noise.

    Source: selective copying of Gu and Dao, Mamba, 2023 (16 symbols, the noise among them); the
    symbols and places are those of ``torch_copying_data(variable=True)`` in state-spaces/s4,
    ``src/dataloaders/datasets/copying.py``. Differs: the length given there is the number of noise
    tokens only. Whether the paper's 4,096 include the data and the markers
    was not found out.

    Args:
        num_tokens: Data tokens, K.  (default: :obj:`16`)
        vocab_size: Symbols, noise and marker among them.  (default: :obj:`16`)

    Raises:
        ValueError: If there is no data token, or no kind of it.

    Example:
        >>> task = SelectiveCopy(num_tokens=3)
        >>> x, y = task.sample(1, 11, torch.Generator().manual_seed(0))
        >>> x
        tensor([[ 5,  0,  0,  4,  0,  0,  0,  8, 15, 15, 15]])
        >>> y
        tensor([[-100, -100, -100, -100, -100, -100, -100, -100,    5,    4,    8]])
    """

    num_tokens: int = 16
    vocab_size: int = 16
    name = "selective_copy"

    @property
    def min_length(self) -> int:
        return 2 * self.num_tokens

    def _write(self, x: Tensor, data: Tensor, generator: Generator) -> None:
        num_examples, length = x.shape
        places = distinct(num_examples, self.num_tokens, length - self.num_tokens, generator)
        x.scatter_(1, places.sort(dim=1).values, data)
        x[:, -self.num_tokens :] = self.vocab_size - 1
