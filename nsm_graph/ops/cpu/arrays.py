"""Memory as kernels like it: begun at cache lines, rows spread over the sets of the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: float32 numbers of a cache line.
LINE = 16


def empty(dtype: torch.dtype, *shape: int) -> np.ndarray:
    """Torch begins its memory at cache lines; numpy does not, and vectors would lie across two."""
    return torch.empty(shape, dtype=dtype).numpy()


def spread(num_columns: int) -> int:
    """Columns to make room for, so that neighbours in a column do not share a cache set.

    Rows a power of two apart fall into a few sets of the first-level cache and push each other out.
    """
    lines = -(-num_columns // LINE)
    return LINE * (lines + 1 - lines % 2)


def place(x: Tensor) -> np.ndarray:
    """A copy of a matrix or vector for kernels to read; a matrix has columns to spare."""
    width = x.size(-1) if x.dim() == 1 or x.numel() == 0 else spread(x.size(-1))
    at = torch.zeros(*x.shape[:-1], width, dtype=x.dtype)
    at[..., : x.size(-1)] = x.detach()
    return at.numpy()


def array(x: Tensor) -> np.ndarray:
    """A tensor's numbers, rows side by side."""
    return x.detach().contiguous().numpy()
