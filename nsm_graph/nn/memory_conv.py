"""A memory of state nodes as one line in any PyG model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsm_graph.nn.checks import check_features
from nsm_graph.nn.communication import StateCommunication
from nsm_graph.nn.edge_attention_layer import hide_from_explainers
from nsm_graph.nn.hybrid_attention import HybridAttention
from nsm_graph.nn.propagator import StatePropagator
from nsm_graph.nn.readout import TokenReadout
from nsm_graph.nn.router import TokenToStateRouter
from nsm_graph.partition import Partition, ptr_from_batch
from nsm_graph.relation import Relation


class MemoryConv(nn.Module):
    r"""Lets the nodes of each graph write into a few state nodes, and read them back.

    .. math::
        x' &= x + \mathrm{conv}(x, \text{edge\_index}) \quad \text{(where a conv is given)} \\
        u &= \mathrm{route}(x') + \mathrm{attend}(s, x') \\
        s' &= \mathrm{communicate}(\mathrm{propagate}(s, u)) \\
        y &= \mathrm{LayerNorm}(x' + \mathrm{read}(x', s'))

    Every node reaches every other of its graph in one layer, at a cost of nodes x states. Hand the
    state on to the next layer (or the next snapshot of the graph) and it remembers.

    Args:
        channels: Size of each node and of each state.
        num_states: State nodes of each graph.
        heads: Number of heads; divides ``channels``. (default: :obj:`4`)
        conv: A PyG convolution from ``channels`` to ``channels`` for the edges of the graph;
            without one the edges are not used. (default: :obj:`None`)

    Shapes:
        - **input:** nodes :math:`(T, C)`, edge_index :math:`(2, E)`, batch :math:`(T,)`, state
          :math:`(B N, C)`
        - **output:** nodes :math:`(T, C)`, state :math:`(B N, C)`

    Raises:
        ValueError: If shapes disagree.

    Example:
        >>> memory = MemoryConv(16, num_states=4)
        >>> x, state = memory(torch.randn(9, 16), batch=torch.tensor([0] * 5 + [1] * 4))
        >>> x.shape, state.shape
        (torch.Size([9, 16]), torch.Size([8, 16]))
    """

    slot_dims = {"bank": 0}

    def __init__(
        self, channels: int, num_states: int, heads: int = 4, *, conv: nn.Module | None = None
    ) -> None:
        super().__init__()
        if min(num_states, heads) < 1:
            raise ValueError(
                f"num_states and heads must be positive, but are {num_states} and {heads}"
            )
        self.channels, self.num_states, self.heads = channels, num_states, heads
        self.conv = conv
        self.bank = nn.Parameter(torch.empty(num_states, channels))
        self.router = TokenToStateRouter(
            channels, channels, num_states, heads, routing_reduce="mean"
        )
        self.attention = HybridAttention((channels, channels), heads)
        self.propagator = StatePropagator(channels)
        self.communication = StateCommunication(channels, heads)
        self.readout = TokenReadout(channels, channels, heads)
        self.norm = nn.LayerNorm(channels)
        # An explainer sees the edges of the graph, in `conv`, and none of the memory's own.
        hide_from_explainers(self.router, self.attention, self.communication, self.readout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bank, std=0.5)
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def reset_slots(self, slots: Tensor) -> None:
        """Fresh bank rows for slots that were just allocated."""
        with torch.no_grad():
            self.bank[slots] = torch.randn_like(self.bank[slots]) * 0.5

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None = None,
        batch: Tensor | Partition | None = None,
        state: Tensor | None = None,
        *,
        edge_attr: Tensor | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Runs the forward pass of the module.

        Args:
            x: The nodes.
            edge_index: Edges of the graph; only ``conv`` reads them. (default: :obj:`None`)
            batch: The graph of each node, sorted; ``None`` for one graph. A
                :class:`~nsm_graph.Partition` made once serves stacked layers, and compiled ones
                without a graph break. (default: :obj:`None`)
            state: States from an earlier call; ``None`` to start from the bank.
                (default: :obj:`None`)
            edge_attr: Edge features, handed to ``conv`` where given. (default: :obj:`None`)
            batch_size: Number of graphs; ``None`` to find it from ``state`` or ``batch``.
                (default: :obj:`None`)
        """
        check_features(x, self.channels, "x", self.bank)
        nodes = self._partition(x, batch, batch_size, state)
        if nodes.num_rows != x.size(0):
            raise ValueError(f"batch has {nodes.num_rows} entries, but x has {x.size(0)} rows")
        num_states = nodes.num_examples * self.num_states
        if state is None:
            state = self.bank.repeat(nodes.num_examples, 1)
        elif state.shape != (num_states, self.channels):
            raise ValueError(
                f"state must have shape ({num_states}, {self.channels}), but has "
                f"{tuple(state.shape)}; carry it between batches of the same graphs only"
            )
        states = Partition.uniform(nodes.num_examples, self.num_states, x.device)
        writes, talks = Relation.between(nodes, states), Relation.between(states, states)

        if self.conv is not None:
            edges = (edge_index,) if edge_attr is None else (edge_index, edge_attr)
            x = x + self.conv(x, *edges)
        update = self.router(x, writes) + self.attention((x, state), writes)
        mask = None if writes.reaches_every_target else writes.has_in_edge
        state = self.propagator(state, update, mask=mask).state
        state = self.communication(state, talks)
        x = self.norm(x + self.readout((state, x), writes.reverse()))
        return x, state

    def _partition(
        self,
        x: Tensor,
        batch: Tensor | Partition | None,
        batch_size: int | None,
        state: Tensor | None,
    ) -> Partition:
        if isinstance(batch, Partition) or batch is None:
            nodes = Partition.uniform(1, x.size(0), x.device) if batch is None else batch
            if batch_size is not None and batch_size != nodes.num_examples:
                raise ValueError(
                    f"batch_size is {batch_size}, but batch stands for {nodes.num_examples} graphs"
                )
            return nodes
        if batch_size is None:
            if state is not None:
                batch_size = state.size(0) // self.num_states
            else:
                batch_size = int(batch.flatten()[-1]) + 1 if batch.numel() > 0 else 0
        return Partition.from_ptr(ptr_from_batch(batch, batch_size))

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.channels}, num_states={self.num_states}, "
            f"heads={self.heads})"
        )
