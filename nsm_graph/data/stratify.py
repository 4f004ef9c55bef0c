r"""Splits that keep the share of every class, drawn from a seed.

Both rules read one list: the examples sorted by class and shuffled within each class. Whatever
takes evenly spaced entries of that list takes its share of every class.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def random_state(seed: int | Sequence[int]) -> np.random.RandomState:
    r"""The generator of all splits."""
    # NumPy promises RandomState's stream for ever; that of its newer generators may change.
    return np.random.RandomState(seed)


def stratified_folds(labels: Indices, num_folds: int, seed: int | Sequence[int]) -> list[Indices]:
    r"""Deals the examples into folds whose sizes, also within a class, differ by one at most."""
    if not 2 <= num_folds <= len(labels):
        raise ValueError(f"num_folds is {num_folds}; choose 2 to {len(labels)}, one example a fold")
    order = _by_class(labels, seed)
    return [np.sort(order[fold::num_folds]) for fold in range(num_folds)]


def stratified_choice(
    labels: Indices, size: int, seed: int | Sequence[int]
) -> tuple[Indices, Indices]:
    r"""Draws :obj:`size` of the examples; returns those drawn and the rest."""
    if not 0 <= size <= len(labels):
        raise ValueError(f"{size} examples are wanted, but there are {len(labels)}")
    order = _by_class(labels, seed)
    # The middle of each of `size` equal stretches: integers only, so it is the same everywhere.
    picked = (2 * np.arange(size) + 1) * len(labels) // max(2 * size, 1)
    return np.sort(order[picked]), np.sort(np.delete(order, picked))


def _by_class(labels: Indices, seed: int | Sequence[int]) -> Indices:
    shuffled = random_state(seed).permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")].astype(np.int64)
