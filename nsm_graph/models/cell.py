"""One segment: scan, gather, propagate, communicate.

The cell is a pure function (states, what was hoisted, relations) -> states. What depends on tokens
only is computed for all segments at once by :meth:`StateMachineCell.hoist`, before the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nsm_graph import ops
from nsm_graph.memory import attention_sharpness, routing_mass
from nsm_graph.nn import (
    HybridAttention,
    Propagated,
    RelativePosition,
    RotaryPosition,
    StateAllocator,
    StateCommunication,
    StatePropagator,
    StateSnap,
    TokenToStateRouter,
)
from nsm_graph.nn.checks import check_choice
from nsm_graph.nn.edge_attention_layer import hide_from_explainers
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation
from nsm_graph.topology import NodeSet, Topology

MIXES = ("sum", "bias", "attention", "routing")


class Scan(Protocol):
    """What a module must offer to be a cell's ordered stage; ``nn.SegmentScan`` does.

    ``gated_channels`` are the last channels of each state: the documented update reads all and
    writes only these. The others belong to the scan.
    """

    gated_channels: int
    gated_dropout: float  #: share of examples whose gated channels read-outs miss in training

    def convolve(self, x: Tensor, examples: Partition, tail: Tensor | None) -> Tensor:
        """Tokens that know the one before; ``tail`` holds the last one of the call before."""
        ...

    def hoist(
        self,
        x: Tensor,
        relation: Relation,
        weights: Tensor | None,
        slots: Tensor | None,
        reads: bool,
    ) -> tuple:
        """Whatever depends on tokens only: a (nested) tuple of tensors, one entry per group."""
        ...

    def advance(
        self, states: Tensor, hoisted: tuple, relation: Relation
    ) -> tuple[Tensor, Tensor | None]:
        """States ``[N, C]`` after the segment, and what its tokens read (or None).

        Reads are ``[B, S, C_t]``, examples side by side, S the longest segment of the call.
        """
        ...


class SegmentInputs(NamedTuple):
    """What one call of the cell reads besides states; everything here was hoisted."""

    relation: Relation  #: tokens -> states of this segment; sparse where the router made it so
    routed: Tensor | None  #: ``[N, C]``, projected routed sums
    key: Tensor | None  #: ``[T, C]``
    value: Tensor | None  #: ``[T, C]``
    bias: Tensor | None  #: ``[E, 1 or H]``, added to the attention scores
    scan: tuple | None  #: what the scan hoisted
    mask: Tensor | None  #: ``[N]``, states that at least one edge enters; None = all
    talks: Relation | None  #: states -> states; None where dynamic or off
    nodes: NodeSet | None  #: for a dynamic topology
    slots: Tensor | None = None  #: ``[N]``, of the states of one example; None = all, in order


class CellOutput(NamedTuple):
    """What one segment gives."""

    propagated: Propagated
    states: Tensor  #: ``[N, C]``, after communication
    reads: Tensor | None  #: ``[B, S, C_t]``, from the scan, examples side by side
    attention: Tensor | None  #: ``[E, H]``, where asked for
    talks: Relation | None
    margin: Tensor | None = None  #: ``[B]``, how sure the snap was


class StateMachineCell(nn.Module):
    r"""Reads one segment into the states.

    .. math::
        s &\leftarrow \mathrm{scan}(s, x) \quad \text{(optional)} \\
        u &= \mathrm{route}(x) + \mathrm{attend}(s, x) \quad \text{(} \mathtt{mix} \text{)} \\
        s &\leftarrow \mathrm{propagate}(s, u) \\
        s &\leftarrow \mathrm{communicate}(s) \quad \text{(optional)}

    With a scan that keeps heads to itself, propagation and communication read every channel and
    write the gated ones, so that they cannot blur what the scan knows exactly.

    Args:
        token_channels: Size of each token.
        state_channels: Size of each state.
        num_states: Number of slots.
        heads: Number of heads.
        segment_length: Longest segment, for positions inside it; ``None`` without such positions.
        cell: ``"gru"`` or ``"lstm"``.
        mix: ``"sum"``, ``"bias"``, ``"attention"`` or ``"routing"``.
        communication: Topology of the state-state graph; ``None`` for no communication.
        position: ``"rotary"`` or ``"relative"`` act here, on keys and scores; others are ignored.
        top_k: States that each token keeps.
        routing_reduce: ``"sum"`` or ``"mean"``.
        separate_values: Project values apart from keys.
        scan: An ordered stage, see :class:`Scan`.
        allocator: Gives every example a node set of its own; addresses stand in the first channels
            of each state, which the gates do not write either.
    """

    def __init__(
        self,
        token_channels: int,
        state_channels: int,
        num_states: int,
        heads: int,
        *,
        segment_length: int | None,
        cell: str,
        mix: str,
        communication: Topology | None,
        position: str | None,
        top_k: int | None,
        routing_reduce: str,
        separate_values: bool,
        scan: nn.Module | None,
        allocator: StateAllocator | None = None,
    ) -> None:
        super().__init__()
        check_choice("mix", mix, MIXES)
        if communication is not None and not isinstance(communication, Topology):
            raise ValueError(
                f"communication must be a topology or None, but is {communication!r}; use "
                f"nsm_graph.topology, or wrap a function with topology.rule"
            )
        if top_k is not None and mix == "attention":
            raise ValueError('top_k acts in the router, but mix="attention" has none')
        if mix == "routing" and (position in ("rotary", "relative") or separate_values):
            given = "separate_values" if separate_values else f"position={position!r}"
            raise ValueError(f'{given} acts in the attention, but mix="routing" has none')
        self.mix = mix
        self.topology = communication
        self.scan = scan
        self.allocator = allocator
        #: Draws the states to codes after each segment; see :meth:`NeuralStateMachine.fit_snap`.
        self.snap: StateSnap | None = None
        #: Whether all segments may be read in one kernel; False to see every operation, "triton"
        #: for the kernel for GPUs as well, which has not been timed on one yet.
        self.fuse: bool | str = True
        self.router = self.attention = self.communication = None
        if mix != "attention":
            self.router = TokenToStateRouter(
                token_channels,
                state_channels,
                num_states,
                heads,
                top_k=top_k,
                routing_reduce=routing_reduce,
            )
        if mix != "routing":
            self.attention = HybridAttention(
                (token_channels, state_channels), heads, separate_values=separate_values
            )
        if mix == "bias":
            # Routing acts as a prior on attention; its sums, and their projection, are not used.
            self.router.lin_out.requires_grad_(False)
        gated = state_channels if scan is None else scan.gated_channels
        if allocator is not None:
            gated = state_channels - allocator.address_channels
        #: Channels that the gates read and do not write: the first of each state.
        self.kept_channels = state_channels - gated
        self.propagator = StatePropagator(
            gated, cell=cell, input_channels=state_channels + self.kept_channels
        )
        if communication is not None:
            gated_heads = math.gcd(gated, heads * gated // state_channels or 1)
            self.communication = StateCommunication(gated, gated_heads)
        hide_from_explainers(self.router, self.attention, self.communication)
        self.rotary = self.relative = None
        if position == "rotary":
            self.rotary = RotaryPosition(state_channels // heads)
        elif position == "relative":
            self.relative = RelativePosition(heads, segment_length or 1)

    def reset_parameters(self) -> None:
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    # Before the loop ############################################################

    def hoist(
        self,
        x: Tensor,
        place: Tensor,
        relation: Relation,
        importance: Tensor,
        slots: Tensor | None,
        *,
        scan_tokens: Tensor | None = None,
        scan_reads: bool = False,
        column: Tensor | None = None,
        routing_bias: Tensor | None = None,
    ) -> tuple[SegmentInputs, Tensor | None]:
        """Everything that depends on tokens only, for all segments in one call each.

        Args:
            x: Tokens in reading order, ``[T, C_t]``.
            place: Index of each token inside its segment, ``[T]``.
            relation: Tokens -> (group, state), all segments.
            importance: Learnable importance of every slot, ``[M]``.
            slots: Active slots; ``None`` for all, in order.
            scan_tokens: What the scan reads, ``[T, C_t]``: tokens without positions.
            scan_reads: Whether tokens are to read from the scan.
            column: Slot of every state row, where examples have node sets of their own.
            routing_bias: Added to the router's logits, ``[E]``.

        Returns:
            The inputs of all segments together, and the routing weights ``[E]``.
        """
        routed = key = value = bias = weights = scan = None
        groups = relation
        if self.router is not None:
            logits = self.router.logits(x, importance, slots)
            routing = self.router.route(x, logits, relation, column, routing_bias)
            weights, relation = routing.weights, routing.relation
            if self.mix == "bias":
                # A weight that underflows is an edge that is all but absent.
                tiny = torch.finfo(weights.dtype).tiny
                bias = weights.clamp(min=tiny).log().unsqueeze(1)
            else:
                routed = self.router.lin_out(routing.routed)
        if self.attention is not None:
            key, value = self.keys(x, place)
            if self.relative is not None:
                relative = self.relative(place)[relation.edge_index[0]]
                bias = relative if bias is None else bias + relative
        if self.scan is not None:
            scan_tokens = x if scan_tokens is None else scan_tokens
            # What top_k dropped has weight zero.
            dense = None if weights is None else groups.from_dense(relation.to_dense(weights))
            scan = self.scan.hoist(scan_tokens, groups, dense, slots, scan_reads)
        # An empty graph, or a state that top_k left out, has no edge and keeps its value.
        mask = None if relation.reaches_every_target else relation.has_in_edge
        inputs = SegmentInputs(relation, routed, key, value, bias, scan, mask, None, None)
        return inputs, weights

    def keys(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens, ``[T, C]``, at their places in a segment."""
        assert self.attention is not None
        key, value = self.attention.project_tokens(x)
        if self.rotary is not None:
            heads = (self.attention.heads, self.attention.head_channels)
            key = self.rotary(key.unflatten(-1, heads), place).flatten(-2)
        return key, value

    @torch.no_grad()
    def sharpness(self, states: Tensor, x: Tensor, place: Tensor, relation: Relation) -> Tensor:
        """How sharply states would attend to tokens, ``[N]``, for whoever watches it."""
        assert self.attention is not None
        heads = (self.attention.heads, self.attention.head_channels)
        query = self.attention.lin_query(states).unflatten(-1, heads)
        key = self.keys(x, place)[0].unflatten(-1, heads)
        bias = None if self.relative is None else self.relative(place)[relation.edge_index[0]]
        weights = ops.edge_attention_weights(query, key, relation, bias=bias)
        return attention_sharpness(weights, relation)

    def split(self, inputs: SegmentInputs, steps: list[Relation]) -> list[SegmentInputs]:
        """Cuts what was hoisted into the slices that the steps read.

        Each tensor is split once: indexing it inside the loop would zero-fill the whole of it in
        every backward step, which is quadratic in the number of segments.
        """
        num_tokens = [step.num_src for step in steps]
        num_rows = [step.num_dst for step in steps]
        is_complete = inputs.relation.is_complete
        relations = steps if is_complete else _split_relation(inputs.relation, steps)
        num_edges = [relation.num_edges for relation in relations]

        # A compiled cell would look at where a view lies in its base, and compile again for that.
        is_compiled = self._compiled_call_impl is not None
        split = torch.split_with_sizes_copy if is_compiled else torch.split_with_sizes

        def cut(rows: Tensor | None, sizes: list[int]) -> list[Tensor] | list[None]:
            return [None] * len(steps) if rows is None else list(split(rows, sizes))

        scans: list[tuple] | list[None] = [None] * len(steps)
        if inputs.scan is not None:
            scans = _cut_nested(inputs.scan, [step.num_examples for step in steps], split)
        return [
            SegmentInputs(relation, routed, key, value, bias, scan, mask, None, None)
            for relation, routed, key, value, bias, scan, mask in zip(
                relations,
                cut(inputs.routed, num_rows),
                cut(inputs.key, num_tokens),
                cut(inputs.value, num_tokens),
                cut(inputs.bias, num_edges),
                scans,
                cut(inputs.mask, num_rows),
                strict=True,
            )
        ]

    def connect(
        self, inputs: list[SegmentInputs], slots: Tensor, first_step: int = 0
    ) -> list[SegmentInputs]:
        """Adds to each step who its states talk to: a relation, or nodes for a dynamic rule."""
        if self.snap is not None:
            inputs = [segment._replace(slots=slots) for segment in inputs]
        if self.topology is None:
            return inputs

        def nodes(num_rows: int, step: int) -> NodeSet:
            rows = Partition.uniform(num_rows // slots.numel(), slots.numel(), slots.device)
            return NodeSet(rows, slots=slots.repeat(rows.num_examples), step=step)

        num_rows = [segment.relation.num_dst for segment in inputs]
        if self.topology.is_dynamic:
            return [
                segment._replace(nodes=nodes(rows, step))
                for step, (segment, rows) in enumerate(
                    zip(inputs, num_rows, strict=True), first_step
                )
            ]
        talks = {rows: self.topology(nodes(rows, 0)) for rows in set(num_rows)}
        return [
            segment._replace(talks=talks[rows])
            for segment, rows in zip(inputs, num_rows, strict=True)
        ]

    def connect_nodes(self, inputs: SegmentInputs, nodes: NodeSet) -> SegmentInputs:
        """The same for one step, whose examples have node sets of their own."""
        if self.topology is None:
            return inputs
        if self.topology.is_dynamic:
            return inputs._replace(nodes=nodes)
        return inputs._replace(talks=self.topology(nodes))

    def routing_mass(self, weights: Tensor | None, relation: Relation) -> Tensor | None:
        """Each state's share of routing weight, ``[G N]``, for whoever watches it in training."""
        if not self.training or weights is None:
            return None
        return routing_mass(weights, relation)

    # Inside the loop ############################################################

    def forward(
        self,
        states: Tensor,
        cell: Tensor | None,
        inputs: SegmentInputs,
        return_attention_weights: bool = False,
    ) -> CellOutput:
        """One segment; see the class."""
        reads = alpha = None
        if self.scan is not None:
            states, reads = self.scan.advance(states, inputs.scan, inputs.relation)

        update = inputs.routed
        if self.attention is not None:
            query = self.attention.lin_query(states)
            attended, alpha = self.attention.attend(
                query,
                inputs.key,
                inputs.value,
                inputs.relation,
                inputs.bias,
                return_attention_weights,
            )
            attended = self.attention.lin_out(attended)
            update = attended if update is None else update + attended

        kept, gated = states[:, : self.kept_channels], states[:, self.kept_channels :]
        if self.kept_channels > 0:
            assert update is not None
            update = torch.cat([update, kept], dim=1)
        propagated = self.propagator(gated, update, cell, mask=inputs.mask)
        gated, talks = propagated.state, inputs.talks
        if self.communication is not None:
            if talks is None:
                assert self.topology is not None
                assert inputs.nodes is not None
                x = torch.cat([kept, gated], dim=1) if self.kept_channels > 0 else gated
                talks = self.topology(replace(inputs.nodes, x=x))
            gated = self.communication(gated, talks)
        states = torch.cat([kept, gated], dim=1) if self.kept_channels > 0 else gated
        margin = None
        if self.snap is not None:
            states, margin = self._snap(self.snap, states, inputs)
        return CellOutput(propagated, states, reads, alpha, talks, margin)

    def _snap(
        self, snap: StateSnap, states: Tensor, inputs: SegmentInputs
    ) -> tuple[Tensor, Tensor]:
        """Draws the first channels of the states, as many as the codes have, to their codes."""
        rows_BNC = states.unflatten(0, (inputs.relation.num_examples, -1))
        snapped = snap(rows_BNC[..., : snap.channels], inputs.slots)
        rows_BNC = torch.cat([snapped.states, rows_BNC[..., snap.channels :]], dim=-1)
        return rows_BNC.flatten(0, 1), snapped.margin


def _cut_nested(tree: tuple, sizes: list[int], split: Callable) -> list:
    """Cuts every tensor of a nested tuple along its first dimension: one tuple for each size."""

    def cut(leaf: Tensor | tuple | None) -> list:
        if isinstance(leaf, Tensor):
            return list(split(leaf, sizes))
        if isinstance(leaf, tuple):
            make = getattr(leaf, "_make", tuple)  # named tuples stay what they are
            return [make(row) for row in zip(*(cut(field) for field in leaf), strict=True)]
        return [leaf] * len(sizes)

    return cut(tree)


def _split_relation(relation: Relation, steps: list[Relation]) -> list[Relation]:
    """Cuts a sparse relation whose edges stand step by step into one relation a step."""
    edge_index = relation.edge_index
    last_row = torch.tensor([step.num_dst for step in steps]).cumsum(0).to(edge_index.device)
    # Edges keep the order of the complete relation: by group, hence by step.
    ends = torch.searchsorted(edge_index[1].contiguous(), last_row).tolist()
    relations, first, token, row = [], 0, 0, 0
    for end, step in zip(ends, steps, strict=True):
        edges = edge_index[:, first:end] - edge_index.new_tensor([[token], [row]])
        relations.append(Relation(edges, step.size, step.sources, step.targets))
        first, token, row = end, token + step.num_src, row + step.num_dst
    return relations
