r"""The spectral gap of a graph: how fast what one node knows reaches all.

It is the second smallest eigenvalue of the normalised Laplacian :math:`I - D^{-1/2} A D^{-1/2}` of
the graph with every edge in both directions: 0 where it falls into parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Beyond so many nodes the eigenvalue is found by Lanczos steps instead of exactly.
MAX_EXACT_NODES = 1024

NUM_STEPS = 160


def spectral_gap(edge_index: Tensor, num_nodes: int) -> float:
    """See the module; exact up to 1,024 nodes, beyond it a bound from above that is close."""
    src, dst = edge_index.cpu()
    both = torch.cat([src * num_nodes + dst, dst * num_nodes + src]).unique()
    src, dst = both % num_nodes, both // num_nodes
    degree = torch.bincount(dst, minlength=num_nodes).double()
    if num_nodes < 2 or bool((degree == 0).any()):
        return 0.0
    weight = (degree[src] * degree[dst]).rsqrt()
    if num_nodes <= MAX_EXACT_NODES:
        matrix = torch.zeros(num_nodes, num_nodes, dtype=torch.double)
        matrix[dst, src] = weight
        return max(0.0, 1.0 - float(torch.linalg.eigvalsh(matrix)[-2]))
    return max(0.0, 1.0 - _second_eigenvalue(src, dst, weight, degree.sqrt()))


def _second_eigenvalue(src: Tensor, dst: Tensor, weight: Tensor, first: Tensor) -> float:
    """Lanczos on what is orthogonal to the first eigenvector, which is known."""
    num_nodes = first.numel()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(num_nodes, dtype=torch.double, generator=generator)
    basis = [first / first.norm()]
    diagonal, beside = [], []
    for _ in range(NUM_STEPS):
        vector = _orthogonal(vector, basis)
        length = float(vector.norm())
        if length < 1e-10:
            break  # the whole space has been seen
        if len(basis) > 1:
            beside.append(length)
        vector = vector / length
        basis.append(vector)
        image = torch.zeros_like(vector).index_add_(0, dst, weight * vector[src])
        diagonal.append(float(image @ vector))
        vector = image
    small = torch.diag(torch.tensor(diagonal, dtype=torch.double))
    off = torch.tensor(beside, dtype=torch.double)
    small = small + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(small)[-1])


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    known = torch.stack(basis)
    for _ in range(2):  # once is not enough: rounding leaves a part
        vector = vector - known.T @ (known @ vector)
    return vector
