r"""Word problems: the running product of group elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Generator, Tensor

from nsm_graph.data.tasks.base import Examples, StreamedTask, block_sizes
from nsm_graph.data.tasks.checks import check_at_least
from nsm_graph.data.tasks.scan import Elements, running_product

# The multiplication table of S_7 would have 25 million entries.
MAX_DEGREE = 6


@dataclass(frozen=True)
class Group:
    r"""A group of permutations; element k is the k-th in the order given.

    .. math::
        (a \circ b)(i) = a(b(i))

    A permutation is the tuple of its images: ``(1, 2, 0)`` sends 0 to 1. The identity must come
    first, so that it is element 0.

    Args:
        name: Name of the group.
        elements: Its permutations, all on the same points.

    Raises:
        ValueError: If these are not permutations, do not start with the identity, repeat
            themselves, or are not closed under composition.

    Example:
        >>> group = symmetric_group(3)
        >>> group.elements[1], group.elements[2]
        ((0, 2, 1), (1, 0, 2))
        >>> group.elements[group.table[1, 2]]
        (2, 0, 1)
    """

    name: str
    elements: tuple[tuple[int, ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        points = tuple(range(len(self.elements[0]) if self.elements else 0))
        if not self.elements or self.elements[0] != points:
            raise ValueError(
                f"group {self.name}: the first element must be the identity, got "
                f"{self.elements[:1]}; put it first"
            )
        for element in self.elements:
            if tuple(sorted(element)) != points:
                raise ValueError(
                    f"group {self.name}: {element} is no permutation of {points}; give the images "
                    "of all points"
                )
        known = set(self.elements)
        if len(known) < len(self.elements):
            raise ValueError(f"group {self.name}: an element is given twice; drop one")
        for a, b in itertools.product(self.elements, repeat=2):
            if compose(a, b) not in known:
                raise ValueError(
                    f"group {self.name}: {a} after {b} is {compose(a, b)}, which is not an "
                    "element; add the products of all elements"
                )

    @property
    def order(self) -> int:
        """Number of elements."""
        return len(self.elements)

    @cached_property
    def table(self) -> Tensor:
        r"""Index of :math:`a \circ b`, ``[order, order]``."""
        index = {element: k for k, element in enumerate(self.elements)}
        return torch.tensor([[index[compose(a, b)] for b in self.elements] for a in self.elements])


def compose(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that applies b, then a."""
    return tuple(a[i] for i in b)


@cache
def symmetric_group(degree: int) -> Group:
    """All permutations, in lexicographic order of their images."""
    _check_degree(degree)
    return Group(f"s{degree}", tuple(itertools.permutations(range(degree))))


@cache
def alternating_group(degree: int) -> Group:
    """The even permutations, in lexicographic order of their images."""
    _check_degree(degree)
    permutations = itertools.permutations(range(degree))
    return Group(f"a{degree}", tuple(p for p in permutations if _is_even(p)))


@dataclass(frozen=True)
class WordProblem(StreamedTask):
    r"""Uniform group elements; the label of each is the product of all up to it.

    .. math::
        y_t = x_0 \circ x_1 \circ \dots \circ x_t

    Tokens and labels are indices into :obj:`group.elements`; the state starts at the identity, 0,
    and becomes state :math:`\circ` token.

    Source: the word problems of Merrill et al., The Illusion of State in State-Space Models, 2024,
    jopetty/word-problem, ``src/generate_data.py``, which composes in the same order. Differs:
    sequences may repeat, theirs are made distinct; elements of every group are numbered in
    lexicographic order.

    Args:
        group: The group.

    Example:
        >>> task = WordProblem(symmetric_group(3))
        >>> x, y = task.sample(1, 5, torch.Generator().manual_seed(0))
        >>> x, y
        (tensor([[2, 3, 5, 0, 1]]), tensor([[2, 1, 3, 3, 2]]))
    """

    group: Group
    min_length = 1

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def num_symbols(self) -> int:
        return self.group.order

    @property
    def num_classes(self) -> int:
        return self.group.order

    def _blocks(self, num_examples: int, length: int, generator: Generator) -> Iterator[Examples]:
        order, flat_table = self.group.order, self.group.table.view(-1)

        def product(a: Tensor, b: Tensor) -> Tensor:
            # An index into the flat table is several times faster than a pair of indices.
            return flat_table.index_select(0, (a * order + b).view(-1)).view(b.shape)

        def combine(a: Elements, b: Elements) -> Elements:
            return (product(a[0], b[0]),)

        state = torch.zeros(num_examples, 1, dtype=torch.long)
        for size in block_sizes(length):
            x = torch.randint(order, (num_examples, size), generator=generator)
            (inside,) = running_product(combine, (x,))
            y = product(state, inside)
            state = y[:, -1:]
            yield x, y


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return inversions % 2 == 0


def _check_degree(degree: int) -> None:
    check_at_least("group", "degree", degree, 1)
    if degree > MAX_DEGREE:
        raise ValueError(f"group: degree is {degree}; give at most {MAX_DEGREE}")
