r"""Modular arithmetic with brackets."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from nsm_graph.data.tasks.arithmetic import MINUS, TIMES
from nsm_graph.data.tasks.base import IGNORED, Examples, SequenceTask
from nsm_graph.data.tasks.checks import check_at_least, check_is_bool

# Symbols after the digits and the three operators.
OPEN, CLOSE = 3, 4

# (d) is the shortest with brackets; two operands need an operator and a token each inside them.
MIN_BRACKETED, MIN_BINARY = 3, 5


class Level(NamedTuple):
    """All expressions of one nesting depth, of all examples; places count through the batch.

    The next level holds the left operands of its binary expressions, then the right ones.
    """

    is_binary: Tensor  #: ``[N]``, M of them, the others are leaves
    digit_place: Tensor  #: ``[N - M]``
    leaf_value: Tensor  #: ``[N - M]``
    operator_place: Tensor  #: ``[M]``
    operator: Tensor  #: ``[M]``
    close_place: Tensor  #: ``[M]``


@dataclass(frozen=True)
class ModularArithmeticBrackets(SequenceTask):
    r"""A nested expression of exactly L tokens; the last label is its value.

    An expression of 1, 2, 3 or 4 tokens is a leaf: ``d``, ``-d``, ``(d)`` or ``(-d)``, with a
    uniform digit d. A longer one of n tokens is ``(left op right)``: left has a number of tokens
    drawn uniformly from 1 to n - 4, right has the other n - 3 of them, and op is uniform.
    All values are modulo :obj:`modulus`. Each operator has its own brackets, so precedence is
    never in question; a minus in front of a digit belongs to the digit.

    With :obj:`has_dense_labels` each digit and each closing bracket has a label: the value of
    what has been read since the innermost bracket that is still open, or since the beginning if
    none is. What is labelled is always complete: one operand, or two with their operator. The
    labels of ``((1+2)*(-3))`` modulo 5 are 1 and 3 at its first digits, 3 at the bracket after
    them, 2 at the last digit, and 1 at the last two brackets.

    Source: Delétang et al., Neural Networks and the Chomsky Hierarchy, 2022,
    ``tasks/dcf/modular_arithmetic_brackets.py``; grammar, distribution and numbering of the symbols
    are theirs, ``*`` included as in their experiments. Differs: labels inside the sequence; no
    symbols that never occur. Grazzi et al., Unlocking State-Tracking, 2024, draw the same
    expressions, but count ``=``, the answer and a padding symbol as tokens: their length L
    is L - 3 here; ``*`` is off unless they ask for it.

    Args:
        modulus: Number of digits.  (default: :obj:`5`)
        has_times: Whether operators are ``+``, ``-`` and ``*``, or ``+`` and ``-`` only.
            (default: :obj:`True`)
        has_dense_labels: Whether more than the last token has a label.  (default: :obj:`True`)

    Raises:
        ValueError: If :obj:`modulus` is below 2, or a switch is not a boolean.

    Example:
        >>> task = ModularArithmeticBrackets()
        >>> x, y = task.sample(1, 11, torch.Generator().manual_seed(0))
        >>> "".join(task.symbols[i] for i in x[0])
        '((-3--2)*0)'
        >>> y
        tensor([[-100, -100, -100, 2, -100, -100, 4, 4, -100, 0, 0]])
    """

    modulus: int = 5
    has_times: bool = True
    has_dense_labels: bool = True
    name = "modular_arithmetic_brackets"
    min_length = 1

    def __post_init__(self) -> None:
        check_at_least(self.name, "modulus", self.modulus, 2)
        check_is_bool(self.name, "has_times", self.has_times)
        check_is_bool(self.name, "has_dense_labels", self.has_dense_labels)

    @property
    def num_symbols(self) -> int:
        return self.modulus + 5

    @property
    def num_classes(self) -> int:
        return self.modulus

    @property
    def symbols(self) -> tuple[str, ...]:
        """How each symbol is written."""
        return (*map(str, range(self.modulus)), "+", "-", "*", "(", ")")

    def _sample(self, num_examples: int, length: int, generator: Generator) -> Examples:
        x = torch.empty(num_examples, length, dtype=torch.long)
        y = torch.full_like(x, IGNORED)
        levels = self._write(x.view(-1), num_examples, length, generator)
        values = self._label(y.view(-1), levels)
        if not self.has_dense_labels:
            y.fill_(IGNORED)
        y[:, -1] = values
        return x, y

    def _write(
        self, tokens: Tensor, num_examples: int, length: int, generator: Generator
    ) -> list[Level]:
        """Writes expressions from the outside in, all of one nesting depth at once."""
        start = torch.arange(num_examples) * length
        size = torch.full_like(start, length)
        levels = []
        while start.numel():
            is_bracketed = size >= MIN_BRACKETED
            tokens[start[is_bracketed]] = self.modulus + OPEN
            tokens[(start + size - 1)[is_bracketed]] = self.modulus + CLOSE

            is_binary = size >= MIN_BINARY
            leaf_size = size[~is_binary]
            digit_place = start[~is_binary] + leaf_size // 2
            digit = torch.randint(self.modulus, leaf_size.shape, generator=generator)
            # Leaves of two and of four tokens.
            has_minus = leaf_size % 2 == 0
            tokens[digit_place] = digit
            tokens[digit_place[has_minus] - 1] = self.modulus + MINUS
            leaf_value = torch.where(has_minus, -digit, digit) % self.modulus

            binary, size = start[is_binary], size[is_binary]
            share = torch.rand(size.shape, generator=generator, dtype=torch.double)
            left_size = 1 + (share * (size - 4)).long()
            operator_place = binary + 1 + left_size
            choices = 3 if self.has_times else 2
            operator = torch.randint(choices, size.shape, generator=generator)
            tokens[operator_place] = self.modulus + operator

            close_place = binary + size - 1
            levels.append(
                Level(is_binary, digit_place, leaf_value, operator_place, operator, close_place)
            )
            start = torch.cat([binary + 1, operator_place + 1])
            size = torch.cat([left_size, size - 3 - left_size])
        return levels

    def _label(self, labels: Tensor, levels: list[Level]) -> Tensor:
        """Labels expressions from the inside out; returns the values of the outermost."""
        values = torch.empty(0, dtype=torch.long)
        for level in reversed(levels):
            left, right = values.view(2, -1)
            both = self._apply(level.operator, left, right)
            values = torch.empty(len(level.is_binary), dtype=torch.long)
            values[level.is_binary], values[~level.is_binary] = both, level.leaf_value
            # The outer level comes later: it replaces the value of a right operand by that of both.
            labels[level.digit_place] = level.leaf_value
            labels[level.operator_place - 1] = left
            labels[level.close_place - 1] = both
        return values

    def _apply(self, operator: Tensor, left: Tensor, right: Tensor) -> Tensor:
        added = left + torch.where(operator == MINUS, -right, right)
        return torch.where(operator == TIMES, left * right, added) % self.modulus
