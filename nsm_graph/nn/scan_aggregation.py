"""The scan in PyG's aggregation shape: what enters a node is composed in order (X8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.segment_scan import SegmentScan
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation


class ScanAggregation(Aggregation):
    r"""Composes the elements of each group in order, from learned initial states.

    .. math:: y_b = W \, \big\Vert_{j=1}^{N} \mathrm{scan}(s_j, x_1, x_2, \dots, x_{n_b})

    An ordered, non-commutative aggregation for any :class:`~torch_geometric.nn.MessagePassing`
    (``aggr=ScanAggregation(...)``) whose messages arrive in a meaningful order, as
    :class:`~torch_geometric.nn.aggr.LSTMAggregation` is. A group without elements gives what the
    initial states give.

    Args:
        in_channels: Size of each element.
        out_channels: Size of each output.
        num_states: States that read each group. (default: :obj:`4`)
        state_channels: Size of each state; ``None`` for ``out_channels``. (default: :obj:`None`)
        **options: Of :class:`~nsm_graph.nn.SegmentScan`: ``heads``, ``memory_heads``,
            ``reflections``, ``layers``, ``decay``. There are no gated heads, and no routing.

    Shapes:
        - **input:** elements :math:`(E, F_{in})`, sorted index :math:`(E,)` or ptr :math:`(B + 1,)`
        - **output:** :math:`(B, F_{out})`

    Raises:
        ValueError: If the index is not sorted, or an option needs routing weights.

    Example:
        >>> aggr = ScanAggregation(8, 16)
        >>> aggr(torch.randn(5, 8), torch.tensor([0, 0, 0, 2, 2])).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_states: int = 4,
        state_channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        channels = out_channels if state_channels is None else state_channels
        self.in_channels, self.out_channels, self.num_states = in_channels, out_channels, num_states
        self.bank = nn.Parameter(torch.empty(num_states, channels))
        self.scan = SegmentScan(in_channels, channels, num_states, gated_heads=None, **options)
        if self.scan.needs_weights:
            raise ValueError(
                "write, routed and read='routed' need routing weights, which an aggregation does "
                "not have; leave them out"
            )
        self.scan.rest_reads()
        self.lin_out = Linear(num_states * channels, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bank, std=0.5)
        self.scan.reset_parameters()
        self.lin_out.reset_parameters()

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        """Runs the forward pass of the module; see :class:`torch_geometric.nn.aggr.Aggregation`."""
        self.assert_two_dimensional_input(x, dim)
        if ptr is None:
            self.assert_index_present(index)
            self.assert_sorted_index(index)
            assert index is not None
            size = dim_size if dim_size is not None else int(index[-1]) + 1 if len(index) else 0
            counts = torch.bincount(index, minlength=size)
            ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        groups = Partition.from_ptr(ptr)
        rows = Partition.uniform(groups.num_examples, self.num_states, x.device)
        relation = Relation.between(groups, rows)
        states = self.bank.repeat(groups.num_examples, 1)
        hoisted = self.scan.hoist(self.scan.convolve(x, groups), relation, None, None, reads=False)
        states, _ = self.scan.advance(states, hoisted, relation)
        return self.lin_out(states.view(groups.num_examples, -1))

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.in_channels}, {self.out_channels})"
