r"""Running products of an associative operation, along the sequences and all at once."""

from collections.abc import Callable

import torch
from torch import Tensor

Elements = tuple[Tensor, ...]


def running_product(combine: Callable[[Elements, Elements], Elements], x: Elements) -> Elements:
    r"""Combines each position with all positions before it, in :math:`\log_2 L` passes.

    .. math::
        y_t = x_0 \circ x_1 \circ \dots \circ x_t

    Source: Hillis and Steele, Data parallel algorithms, 1986. After pass k every position holds
    the product of the :math:`2^k` positions that end with it.

    Args:
        combine: The operation on elements; an element may consist of several tensors.
        x: The elements.

    Shapes:
        - **input:** tensors :math:`(B, L)`
        - **output:** tensors :math:`(B, L)`

    Example:
        >>> running_product(lambda a, b: (a[0] + b[0],), (torch.ones(1, 5, dtype=torch.long),))
        (tensor([[1, 2, 3, 4, 5]]),)
    """
    distance = 1
    while distance < x[0].size(1):
        earlier = tuple(part[:, :-distance] for part in x)
        later = tuple(part[:, distance:] for part in x)
        products = combine(earlier, later)
        x = tuple(
            torch.cat([part[:, :distance], product], dim=1)
            for part, product in zip(x, products, strict=True)
        )
        distance *= 2
    return x
