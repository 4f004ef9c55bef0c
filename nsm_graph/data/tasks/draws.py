r"""Drawing without replacement, for many examples at once."""

import torch
from torch import Generator, Tensor


def distinct(num_examples: int, count: int, size: int, generator: Generator) -> Tensor:
    r"""Distinct integers below :obj:`size` in random order, every such row equally likely.

    Rows are drawn with replacement, and what repeats an earlier number is drawn again until
    nothing does. The procedure treats all numbers alike, so all rows of distinct numbers
    are equally likely.

    Args:
        num_examples: Number of rows, :math:`B`.
        count: Numbers in each, :math:`K`, at most :obj:`size`.
        size: Numbers to choose from.
        generator: Where the random numbers come from.

    Shapes:
        - **output:** int64 :math:`(B, K)`
    """
    if 2 * count > size:
        # Drawing again would take long where little is left to choose from.
        keys = torch.rand(num_examples, size, generator=generator, dtype=torch.double)
        return keys.argsort(dim=1)[:, :count]
    rows = torch.randint(size, (num_examples, count), generator=generator)
    while True:
        ordered, order = rows.sort(dim=1, stable=True)
        repeats = ordered[:, 1:] == ordered[:, :-1]
        is_repeated = torch.zeros_like(rows, dtype=torch.bool)
        is_repeated.scatter_(1, order[:, 1:], repeats)
        missing = int(is_repeated.sum())
        if missing == 0:
            return rows
        rows[is_repeated] = torch.randint(size, (missing,), generator=generator)


def weighted_distinct(
    num_examples: int, count: int, weights: Tensor, generator: Generator
) -> Tensor:
    r"""Distinct indices, drawn one after the other with probabilities proportional to weights.

    Index i gets an exponential waiting time with rate :math:`w_i`; the first :obj:`count` to
    arrive are those that successive draws without replacement give, in the same order.

    Shapes:
        - **input:** weights, positive :math:`(S)`
        - **output:** int64 :math:`(B, K)`, first drawn first
    """
    waits = torch.empty(num_examples, len(weights), dtype=torch.double)
    waits.exponential_(generator=generator)
    return (waits / weights).topk(count, dim=1, largest=False, sorted=True).indices
