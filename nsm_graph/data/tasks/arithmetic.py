r"""Modular arithmetic without brackets."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nsm_graph.data.tasks.base import IGNORED, Examples, StreamedTask, block_sizes
from nsm_graph.data.tasks.checks import check_at_least
from nsm_graph.data.tasks.scan import Elements, running_product

# Operators follow the digits: symbol m is +, m + 1 is -, m + 2 is *.
PLUS, MINUS, TIMES = range(3)


@dataclass(frozen=True)
class ModularArithmetic(StreamedTask):
    r"""An expression of digits, ``+``, ``-`` and ``*``; the label of a digit is the value up to it.

    Digits stand at even places, operators at odd ones, so lengths are odd; all are uniform.
    ``*`` binds tighter than ``+`` and ``-``, which go from left to right. The label of a digit is
    the value of the expression that ends with it, modulo :obj:`modulus`; operators have none. The
    last label is the answer of the whole.

    Source: modular arithmetic of Delétang et al., Neural Networks and the Chomsky Hierarchy, 2022,
    ``tasks/regular/modular_arithmetic.py``; operators, precedence and distribution are theirs.
    Differs: a label at every digit instead of one for the sequence; an even length is refused
    instead of cut; there is no blank symbol.

    Args:
        modulus: Number of digits.  (default: :obj:`5`)

    Raises:
        ValueError: If :obj:`modulus` is below 2.

    Example:
        >>> task = ModularArithmetic()
        >>> x, y = task.sample(1, 7, torch.Generator().manual_seed(0))
        >>> " ".join(task.symbols[i] for i in x[0])
        '4 - 4 + 3 - 0'
        >>> y
        tensor([[   4, -100,    0, -100,    3, -100,    3]])
    """

    modulus: int = 5
    name = "modular_arithmetic"
    min_length = 1

    def __post_init__(self) -> None:
        check_at_least(self.name, "modulus", self.modulus, 2)

    @property
    def num_symbols(self) -> int:
        return self.modulus + 3

    @property
    def num_classes(self) -> int:
        return self.modulus

    @property
    def symbols(self) -> tuple[str, ...]:
        """How each symbol is written."""
        return (*map(str, range(self.modulus)), "+", "-", "*")

    def valid_length(self, length: int) -> int:
        length = super().valid_length(length)
        return length - 1 + length % 2

    def _blocks(self, num_examples: int, length: int, generator: Generator) -> Iterator[Examples]:
        modulus = self.modulus
        # Value = total of the finished terms + the current term; as if it began with "0 +".
        total = term = torch.zeros(num_examples, 1, dtype=torch.long)
        before = torch.full((num_examples, 1), PLUS)
        for size in block_sizes(length):
            num_digits = (size + 1) // 2
            digits = torch.randint(modulus, (num_examples, num_digits), generator=generator)
            operators = torch.randint(3, (num_examples, size // 2), generator=generator)
            # The operator in front of each digit; the last of a block belongs to the next block.
            front = torch.cat([before, operators], dim=1)[:, :num_digits]

            starts = front != TIMES
            factors = torch.where(front == MINUS, modulus - digits, digits)
            factors[:, :1] = torch.where(starts[:, :1], factors[:, :1], term * factors[:, :1])
            _, terms = running_product(self._multiply, (starts, factors % modulus))

            # A term is finished where the next one starts.
            ended = torch.cat([term, terms[:, :-1]], dim=1) * starts
            totals = (total + ended.cumsum(dim=1)) % modulus
            values = (totals + terms) % modulus

            x = torch.empty(num_examples, size, dtype=torch.long)
            x[:, 0::2], x[:, 1::2] = digits, operators + modulus
            y = torch.full_like(x, IGNORED)
            y[:, 0::2] = values
            total, term, before = totals[:, -1:], terms[:, -1:], operators[:, -1:]
            yield x, y

    def _multiply(self, left: Elements, right: Elements) -> Elements:
        """Products that start anew where a term starts."""
        (left_starts, left_value), (right_starts, right_value) = left, right
        value: Tensor = torch.where(
            right_starts, right_value, left_value * right_value % self.modulus
        )
        return left_starts | right_starts, value
