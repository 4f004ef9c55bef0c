"""The Neural State Machine: a bank of state nodes reads sequences and graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from nsm_graph.memory import StateManager, gradient_signal, update_norm
from nsm_graph.models import hetero
from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.embedding import TokenEmbedding, tied_output
from nsm_graph.models.graph import GraphPasses, read_passes
from nsm_graph.models.heads import ExampleHead, TokenHead
from nsm_graph.models.node_sets import read_node_sets
from nsm_graph.models.options import check_at, check_input, check_options
from nsm_graph.models.predict import lost_reads, predict
from nsm_graph.models.segments import SegmentPlan, plan_segments
from nsm_graph.models.sequence import read_sequence
from nsm_graph.models.snapping import fit_snap
from nsm_graph.models.state import MachineOutput, MachineState, Reading, Record, ScanTokens
from nsm_graph.nn import (
    GraphPosition,
    LearnedPosition,
    SinusoidalPosition,
    StateAllocator,
    StateSnap,
    TokenConvolution,
)
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation
from nsm_graph.topology import Topology, complete

#: Examples of a batch whose attention is looked at where its sharpness is watched.
LOOKED_AT = 8


class NeuralStateMachine(nn.Module):
    r"""A bank of state nodes reads token streams segment by segment, or graphs pass by pass.

    .. math::
        s^{(0)} = \text{bank}, \qquad
        s^{(t+1)} = \mathrm{cell}\big(s^{(t)}, \{x_i : i \in \text{segment } t\}\big), \qquad
        y = W \, \mathrm{pool}(s^{(T)})

    Source: Neural State Machine flow. Differences are listed in ``docs/equations.md``.

    Batches are ragged and come unpadded: ``x`` holds the tokens of all examples one after another,
    ``batch`` says whose they are, as in PyG. With ``segment_length=S`` an example is a sequence
    that is read S tokens at a time; with ``segment_length=None`` it is a set or graph whose nodes
    are all read in each of ``num_steps`` passes.

    Args:
        in_channels: Channels of a token, or the number of symbol columns with ``num_embeddings``.
        state_channels: Size of each state.
        num_states: States that are active at first.
        out_channels: Size of each prediction.
        segment_length: Tokens read at a time; ``None`` for graphs and sets.
        heads: Number of heads; divides ``state_channels``. (default: :obj:`4`)
        cell: ``"gru"`` or ``"lstm"``. (default: :obj:`"gru"`)
        mix: How routing and attention meet: ``"sum"``, ``"bias"`` (routing is a prior on
            attention), ``"attention"`` or ``"routing"`` alone. (default: :obj:`"sum"`)
        communication: Topology of the state-state graph; ``None`` for no communication.
            (default: :obj:`nsm_graph.topology.complete()`)
        pool: ``"mean"``, ``"flatten"`` or ``"attention"``. (default: :obj:`"mean"`)
        scan: An ordered stage before gathering: :class:`nsm_graph.nn.SegmentScan`, or a module
            of your own (:class:`nsm_graph.models.cell.Scan`). (default: :obj:`None`)
        allocator: Gives every example a node set of its own, which starts with ``num_states`` and
            grows up to ``max_states``: :class:`nsm_graph.nn.StateAllocator`; for sequences.
            (default: :obj:`None`)
        num_embeddings: Number of symbols (one number, or one for each column); ``None`` for
            features. (default: :obj:`None`)
        token_channels: Size of an embedded token; ``None`` for that of a state.
            (default: :obj:`None`)
        head: ``"example"`` (classification, regression), ``"token"`` (labels) or ``"next_token"``
            (causal). (default: :obj:`"example"`)
        tie_embeddings: Token heads over symbols: one table for input and output.
            (default: :obj:`False`)
        position: ``"learned"``, ``"rotary"`` or ``"relative"`` inside a segment, ``"sinusoidal"``
            along the stream, or ``None``; ``"auto"`` is learned for sequences without a scan, else
            none. The scan itself reads tokens without positions. (default: :obj:`"auto"`)
        top_k: States that each token keeps; ``None`` for all. (default: :obj:`None`)
        routing_reduce: ``"sum"`` as documented, or ``"mean"``. (default: :obj:`"sum"`)
        separate_values: Project values apart from keys. (default: :obj:`False`)
        max_states: Slots that allocation can fill; ``None`` for ``num_states``.
            (default: :obj:`None`)
        min_states: Pruning never leaves fewer. (default: :obj:`1`)
        watch: Signals of importance to watch in training beside the routing mass, and the horizon
            of each: ``{"gradient": 100, "update": 100, "sharpness": 100}`` (of attention), see
            :class:`nsm_graph.memory.StateManager`. (default: :obj:`None`)
        dropout: Dropout of tokens and of what the head reads. (default: :obj:`0.0`)
        num_steps: Passes over a graph; only with ``segment_length=None``. (default: :obj:`None`)
        ordered_nodes: The nodes of each graph stand in a meaningful order, so that a scan may read
            them; only with ``segment_length=None``. (default: :obj:`False`)
        conv: PyG convolution (or one for each pass) between passes, from ``token_channels`` to
            ``token_channels``. (default: :obj:`None`)
        edge_embeddings: Number of edge symbols, embedded for ``conv``. (default: :obj:`None`)
        edge_channels: Channels of edge features, projected for ``conv``. (default: :obj:`None`)
        pe_channels: Size of a graph's positional encoding ``pe``. (default: :obj:`None`)
        pe_kind: ``"random_walk"`` or ``"laplacian"``. (default: :obj:`"random_walk"`)
        bptt_segments: Cut the history inside a call after so many segments.
            (default: :obj:`None`)
        checkpoint_segments: Recompute chunks of so many segments in backward, or ``"sqrt"``.
            (default: :obj:`None`)

    Shapes:
        - **input:** x :math:`(T, C_{in})` or symbols :math:`(T,)`, batch :math:`(T,)` sorted
        - **output:** :math:`(B, C_{out})`, or :math:`(T, C_{out})` for token heads

    Raises:
        ValueError: If an option is unknown or contradicts another, or an input does not fit.

    Example:
        >>> machine = NeuralStateMachine(3, 16, 4, 2, segment_length=8)
        >>> x, batch = torch.randn(30, 3), torch.tensor([0] * 20 + [1] * 10)
        >>> machine(x, batch).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        in_channels: int,
        state_channels: int,
        num_states: int,
        out_channels: int,
        *,
        segment_length: int | None,
        heads: int = 4,
        cell: str = "gru",
        mix: str = "sum",
        communication: Topology | None = complete(),  # noqa: B008 (a rule without state)
        pool: str = "mean",
        scan: nn.Module | None = None,
        allocator: StateAllocator | None = None,
        num_embeddings: int | list[int] | None = None,
        token_channels: int | None = None,
        head: str = "example",
        tie_embeddings: bool = False,
        position: str | None = "auto",
        top_k: int | None = None,
        routing_reduce: str = "sum",
        separate_values: bool = False,
        max_states: int | None = None,
        min_states: int = 1,
        watch: Mapping[str, float] | None = None,
        dropout: float = 0.0,
        num_steps: int | None = None,
        ordered_nodes: bool = False,
        conv: nn.Module | Sequence[nn.Module] | None = None,
        edge_embeddings: int | None = None,
        edge_channels: int | None = None,
        pe_channels: int | None = None,
        pe_kind: str = "random_walk",
        bptt_segments: int | None = None,
        checkpoint_segments: int | str | None = None,
    ) -> None:
        super().__init__()
        token_channels = state_channels if token_channels is None else token_channels
        max_states = num_states if max_states is None else max_states
        if position == "auto":
            # A scan knows the order inside a segment, of whatever length; places would not.
            position = "learned" if segment_length is not None and scan is None else None
        check_options(
            in_channels=in_channels,
            state_channels=state_channels,
            token_channels=token_channels,
            out_channels=out_channels,
            initial_states=num_states,
            num_states=max_states,
            segment_length=segment_length,
            num_steps=num_steps,
            head=head,
            position=position,
            scan=scan,
            allocator=allocator,
            mix=mix,
            watch=watch,
            ordered_nodes=ordered_nodes,
            conv=conv,
            edge_embeddings=edge_embeddings,
            edge_channels=edge_channels,
            pe_channels=pe_channels,
            dropout=dropout,
            bptt_segments=bptt_segments,
            checkpoint_segments=checkpoint_segments,
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.state_channels, self.token_channels = state_channels, token_channels
        self.segment_length = segment_length
        self.num_steps = (num_steps or 1) if segment_length is None else None
        self.bptt_segments, self.checkpoint_segments = bptt_segments, checkpoint_segments

        self.embedding = TokenEmbedding(in_channels, token_channels, num_embeddings)
        self.edge_embedding: TokenEmbedding | None = None
        if edge_embeddings is not None or edge_channels is not None:
            self.edge_embedding = TokenEmbedding(
                edge_channels or 1, token_channels, edge_embeddings, name="edge_attr"
            )
        self.position: nn.Module | None = None
        if position == "learned":
            self.position = LearnedPosition(token_channels, segment_length or 1)
        elif position == "sinusoidal":
            self.position = SinusoidalPosition(token_channels)
        self.graph_position: GraphPosition | None = None
        if pe_channels is not None:
            self.graph_position = GraphPosition(pe_channels, token_channels, pe_kind)
        self.dropout = nn.Dropout(dropout)

        self.manager = StateManager(
            state_channels,
            max_states,
            initial_states=num_states,
            min_states=min_states,
            watch=watch,
        )
        self.cell = StateMachineCell(
            token_channels,
            state_channels,
            max_states,
            heads,
            segment_length=segment_length,
            cell=cell,
            mix=mix,
            communication=communication,
            position=position,
            top_k=top_k,
            routing_reduce=routing_reduce,
            separate_values=separate_values,
            scan=scan,
            allocator=allocator,
        )
        if head == "example" and hasattr(scan, "rest_reads"):
            scan.rest_reads()
        if mix == "attention":
            # Importance acts in the router's logits, and there is no router.
            self.manager.importance.requires_grad_(False)
        self.passes: GraphPasses | None = None
        if conv is not None:
            self.passes = GraphPasses(
                token_channels, state_channels, heads, self.num_steps or 1, conv, dropout
            )
        tied = None
        if tie_embeddings:
            if head == "example":
                raise ValueError("tie_embeddings is for token heads, which can predict symbols")
            tied = tied_output(self.embedding, token_channels, out_channels)
        self.head: ExampleHead | TokenHead
        if head == "example":
            self.head = ExampleHead(state_channels, max_states, out_channels, pool, dropout)
        else:
            self.head = TokenHead(
                token_channels,
                state_channels,
                out_channels,
                heads,
                head == "next_token",
                dropout,
                has_scan=scan is not None,
                output=tied,
            )
        self.manager.register_dependent(self.cell)
        self.manager.register_dependent(self.head)
        # Examples found states in any slot: a free one is in use, and keeps its rows.
        self.manager.keeps_free_slots = allocator is not None

    def reset_parameters(self) -> None:
        """Draws all parameters anew, empties the memory and takes off a fitted snap."""
        self.cell.snap = None
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def compile_cell(self) -> None:
        """Compiles the cell once for all segments and batch sizes; the loop around it stays.

        Where the cell changes too often for that, as with a scan whose ``segment_length`` changes
        from call to call, torch says so and goes on uncompiled.
        """
        self.cell.compile(dynamic=True)

    def fit_snap(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        *,
        batch_size: int | None = None,
        decay: float = 0.99,
    ) -> StateSnap:
        """Derives a codebook for the transition heads from what the machine itself predicts.

        Reads the examples, groups their final states by the prediction for the last token (or for
        the example), and keeps the means: no labels are used. From then on the transition heads
        are drawn to the nearest code after every segment; ``run(..., record=True).record.margins``
        says how sure that was. It helps where the predicted class is all there is to know, as in a
        word problem. ``cell.snap = None`` takes it off.

        Args:
            x: Tokens of examples that cover all classes, of a length that is predicted well.
            batch: As in :meth:`run`.
            batch_size: As in :meth:`run`.
            decay: See :class:`~nsm_graph.nn.StateSnap`.

        Raises:
            ValueError: If the machine has no scan with transition heads, or slots are inactive.
        """
        return fit_snap(self, x, batch, batch_size=batch_size, decay=decay)

    # Calls ######################################################################

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        *,
        batch_size: int | None = None,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        pe: Tensor | None = None,
        segment_length: int | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """The prediction, nothing else; see :meth:`run` for the arguments."""
        return self.run(
            x,
            batch,
            batch_size=batch_size,
            edge_index=edge_index,
            edge_attr=edge_attr,
            pe=pe,
            segment_length=segment_length,
            at=at,
        ).out

    def run(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        state: MachineState | None = None,
        *,
        batch_size: int | None = None,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        pe: Tensor | None = None,
        segment_length: int | None = None,
        at: Tensor | None = None,
        record: bool = False,
    ) -> MachineOutput:
        r"""Everything: prediction, per-token read-outs, the state to carry on, what happened.

        Args:
            x: Tokens of all examples, one example after another.
            batch: The example of each token, sorted; ``None`` for one example.
                (default: :obj:`None`)
            state: From an earlier call on the same streams; ``None`` to start from the bank. Calls
                at multiples of ``segment_length`` give what one long call gives.
                (default: :obj:`None`)
            batch_size: Number of examples, where the last ones may have no tokens.
                (default: :obj:`None`)
            edge_index: Edges among the tokens, for ``conv``. (default: :obj:`None`)
            edge_attr: Their features or symbols. (default: :obj:`None`)
            pe: Positional encoding of a graph's nodes. (default: :obj:`None`)
            segment_length: Read so many tokens at a time in this call; with a scan any number, in
                training and in use. (default: :obj:`None`)
            at: Token heads: predict only for these tokens (their numbers, in any order); where few
                tokens are asked, of many classes, that saves most of the work.
                (default: :obj:`None`)
            record: Keep routing, attention, gates and states of every step.
                (default: :obj:`False`)
        """
        ptr = check_input(
            self, x, batch, batch_size, state, edge_index, edge_attr, pe, segment_length
        )
        check_at(at, x.size(0), isinstance(self.head, TokenHead))
        if state is None:
            state = self._initial_state(ptr.numel() - 1)
        notes = Record() if record else None
        edge_index = None if edge_index is None else edge_index.long()
        tokens = self.embedding(x)
        if self.segment_length is not None:
            segment_length = segment_length or self.segment_length
            plan = plan_segments(
                ptr.diff().tolist(),
                segment_length,
                state.slots.numel(),
                tokens.device,
            )
            plain, scanned = tokens, None
            if self.cell.scan is not None:
                examples = Partition.from_ptr(ptr)
                scanned = ScanTokens(self.dropout(tokens), examples, state.tail)
                state = replace(
                    state, tail=TokenConvolution.next_tail(tokens, examples, state.tail)
                )
            tokens = embedded = self._add_position(tokens, plan, ptr, state)
            if self.cell.allocator is None:
                reading = read_sequence(
                    self.cell,
                    self.dropout(tokens),
                    plan,
                    state,
                    self.manager.importance,
                    segment_length=segment_length,
                    scanned=scanned,
                    tokens_read=isinstance(self.head, TokenHead),
                    bptt_segments=self.bptt_segments,
                    checkpoint_segments=self.checkpoint_segments,
                    record=notes,
                )
            else:
                reading = read_node_sets(
                    self.cell,
                    self.manager,
                    self.dropout(tokens),
                    plain,
                    plan,
                    state,
                    segment_length=segment_length,
                    bptt_segments=self.bptt_segments,
                    checkpoint_segments=self.checkpoint_segments,
                    record=notes,
                )
        else:
            if self.graph_position is not None:
                tokens = self.graph_position(tokens, pe)
            if edge_attr is not None and self.edge_embedding is not None:
                edge_attr = self.edge_embedding(edge_attr)
            embedded, segment_length = tokens, None
            reading = read_passes(
                self.cell,
                self.passes,
                self.dropout(tokens),
                Partition.from_ptr(ptr),
                state,
                self.manager.importance,
                num_steps=self.num_steps,
                scan_reads=isinstance(self.head, TokenHead),
                edge_index=edge_index,
                edge_attr=edge_attr,
                record=notes,
            )
        self._observe_mass(reading)
        has_tokens = ptr.diff() > 0
        if self.training and "update" in self.manager.decays:
            moved = update_norm(state.states, reading.state.states)
            speaks = has_tokens[state.rows.batch]
            self._observe("update", moved[speaks], state.row_slots[speaks])
        if self.training and "sharpness" in self.manager.decays:
            self._observe_sharpness(embedded, ptr, reading.state, segment_length)
        if self.training and self.cell.allocator is not None:
            self.cell.allocator.restrain(float(reading.state.num_states.float().mean()))
        watch = partial(self._watch_gradient, has_tokens)
        out, tokens = predict(self.head, self.cell, reading, at, watch)
        state = replace(reading.state, lost_reads=lost_reads(self.head, reading, at))
        return MachineOutput(out, tokens, state, notes)

    def from_hetero(self, data: HeteroData) -> HeteroData:
        """Reads a ``HeteroData`` and gives one back; see :func:`nsm_graph.models.hetero.read`."""
        return hetero.read(self, data)

    # Inside a call ##############################################################

    def _initial_state(self, num_examples: int) -> MachineState:
        states = self.manager.initial(num_examples)
        cell = None
        if self.cell.propagator.cell == "lstm":
            cell = torch.zeros_like(states[:, self.cell.kept_channels :])
        num_tokens = torch.zeros(num_examples, dtype=torch.long, device=states.device)
        return MachineState(states, cell, num_tokens, self.manager.slots)

    def _add_position(
        self, tokens: Tensor, plan: SegmentPlan, ptr: Tensor, state: MachineState
    ) -> Tensor:
        if isinstance(self.position, LearnedPosition):
            return self.position(tokens, plan.place, plan.full_length)
        if isinstance(self.position, SinusoidalPosition):
            example = Partition.from_ptr(ptr).batch
            return self.position(tokens, plan.index + state.num_tokens[example])
        return tokens

    def _observe_mass(self, reading: Reading) -> None:
        """Feeds the routing mass into the moving average; groups without tokens say nothing."""
        mass, slots, relation = reading.mass, reading.mass_slots, reading.relation
        if mass is None:
            return
        if slots is None:
            slots = reading.state.slots.repeat(mass.numel() // reading.state.slots.numel())
            if relation.sources.min_count == 0:
                has_tokens = (relation.sources.ptr.diff() > 0)[relation.targets.batch]
                mass, slots = mass[has_tokens], slots[has_tokens]
        self._observe("routing", mass, slots)

    def _observe_sharpness(
        self, x: Tensor, ptr: Tensor, state: MachineState, segment_length: int | None
    ) -> None:
        """Feeds how sharply the final states look at what was read last: a segment, or a graph.

        Those of a few examples, spread over the batch: the next batches look at others.
        """
        count = ptr.diff()
        last = count
        if segment_length is not None:
            last = torch.where(count > 0, (count - 1) % segment_length + 1, 0)
        every = -(-count.numel() // LOOKED_AT)
        last = last.masked_fill(torch.arange(count.numel(), device=last.device) % every != 0, 0)
        tokens = Partition.from_counts(last)
        index = (ptr[1:] - last)[tokens.batch] + tokens.place
        relation = Relation.between(tokens, state.rows)
        signal = self.cell.sharpness(state.states, x[index], tokens.place, relation)
        speaks = (last > 1)[state.rows.batch]  # one token alone says nothing
        if bool(speaks.any()):
            self._observe("sharpness", signal[speaks], state.row_slots[speaks])

    def _watch_gradient(
        self, has_tokens: Tensor, states: Tensor, slots: Tensor, example: Tensor | None
    ) -> None:
        """Feeds what the loss asks of the states that a head reads, once backward knows.

        ``example`` is that of each state where the head predicts for examples, of which only those
        with tokens say anything; tokens look at states that read them.
        """
        if not (self.training and states.requires_grad and "gradient" in self.manager.decays):
            return
        rows = states.detach()
        speaks = slice(None) if example is None else has_tokens[example]

        def observe(grad: Tensor) -> None:
            self._observe("gradient", gradient_signal(rows, grad)[speaks], slots[speaks])

        states.register_hook(observe)

    def _observe(self, name: str, signal: Tensor, slots: Tensor) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return  # a function transform allows no side effects
        if bool(signal.sum().isfinite()):  # a diverged step says nothing; its loss shows it
            self.manager.update_importance(signal, slots, name)
