"""The ordered segment scan: states compose the tokens of a segment in order (X8)."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.checks import check_choice, check_features, check_slots
from nsm_graph.nn.scan_heads import MemoryHeads, TransitionHeads
from nsm_graph.nn.scan_layer import PreparedLayer, ScanLayer, SegmentTokens
from nsm_graph.nn.token_convolution import TokenConvolution
from nsm_graph.ops.delta_scan import BACKENDS
from nsm_graph.ops.delta_scan.tokens import STRETCH
from nsm_graph.ops.segment import widen
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation


class HoistedScan(NamedTuple):
    """What a scan computes before the loop; the first dimension of every tensor counts groups."""

    first: PreparedLayer
    tokens: SegmentTokens | None  #: for the layers after the first


class SegmentScan(nn.Module):
    r"""Composes the tokens of each segment into the states, in order.

    A state is cut into heads of three kinds, in this order:

    - *transition* heads compose: :class:`~nsm_graph.nn.scan_heads.TransitionHeads`;
    - *memory* heads recall: :class:`~nsm_graph.nn.scan_heads.MemoryHeads`;
    - *gated* heads belong to the cell's documented update, which reads every head and writes these.

    .. math::
        s_j \leftarrow s_j - \beta_{ir} (k_{ir} \cdot s_j) k_{ir}, \qquad
        S \leftarrow S + \beta_i k_i (v_i - S^\top k_i)^\top, \qquad
        \tilde{x}_i = x_i + W_c [x_{i-1}; x_i]

    The tokens of a segment are read at once and their order is kept: the maps of a chunk compose in
    one triangular solve. In graph terms this is an ordered, non-commutative aggregation over the
    edges from tokens to states.

    Source: ours (X8). With several ``layers`` each owns some of the heads, and a later one reads
    tokens that know what the earlier ones held:
    :math:`x + \mathrm{MLP}([x, \mathrm{LayerNorm}(y)])`. What tokens read is linear in
    :math:`\mathrm{LayerNorm}(y)`, plus such an MLP where there are several layers.

    Args:
        token_channels: Size of each token.
        state_channels: Size of each state.
        num_states: Number of slots.
        heads: Number of heads; divides ``state_channels``. (default: :obj:`4`)
        memory_heads: How many of them recall. (default: :obj:`0`)
        gated_heads: How many of them the gates write; ``None`` to let the gates write all of
            them, after the scan, as the documented update does. (default: :obj:`1`)
        reflections: Reflections of each token, in every transition head. (default: :obj:`2`)
        layers: Scan layers that share the heads; memory heads belong to the last.
            (default: :obj:`1`)
        decay: Tokens may decay transition heads. (default: :obj:`False`)
        write: Tokens may write into transition heads, through their routing weights.
            (default: :obj:`False`)
        routed: Routing weights gate the reflections: which tokens move which states. Only the
            token-by-token form can do it. (default: :obj:`False`)
        read: What a token reads from transition heads: the ``"mean"`` of the states, or their sum
            by routing weights, ``"routed"``. (default: :obj:`"mean"`)
        gated_dropout: Share of the examples whose gated heads are hidden from read-outs in
            training, so that what gates know is no shortcut past the scan. (default: :obj:`0.5`)
        stretch: How soon gates reach 0 and 1 exactly: 0 never, 0.5 at logits of 1.1, 2 at 0.4.
            Exact gates hold at any length; with many symbols to learn, gates that are cut off
            early, and then get no gradient, learn worse: see :meth:`harden`. (default: :obj:`0.5`)
        convolution: Every token knows the one before it, as recall needs it and as an operator in
            front of a digit does. Without it each symbol is one map, always the same, and order
            holds longest. (default: :obj:`True`)
        backend: ``"chunked"``, ``"reference"`` (token by token), or ``None`` to choose.
            (default: :obj:`None`)

    Shapes:
        - **input:** the pair of tokens :math:`(T, C_t)` and states :math:`(N, C)`, a complete
          relation from tokens to states, routing weights :math:`(E,)`
        - **output:** states :math:`(N, C)`, per-token reads :math:`(T, C_t)`

    Raises:
        ValueError: If heads or sizes do not fit, or routing weights are needed and not given.

    Example:
        >>> scan = SegmentScan(8, 16, num_states=3, heads=4, memory_heads=1)
        >>> relation = Relation.complete([0, 5, 7], [0, 3, 6])
        >>> states, reads = scan((torch.randn(7, 8), torch.randn(6, 16)), relation)
        >>> states.shape, reads.shape
        (torch.Size([6, 16]), torch.Size([7, 8]))
    """

    def __init__(
        self,
        token_channels: int,
        state_channels: int,
        num_states: int,
        heads: int = 4,
        *,
        memory_heads: int = 0,
        gated_heads: int | None = 1,
        reflections: int = 2,
        layers: int = 1,
        decay: bool = False,
        write: bool = False,
        routed: bool = False,
        read: str = "mean",
        gated_dropout: float = 0.5,
        stretch: float = STRETCH,
        convolution: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "token_channels": token_channels,
            "state_channels": state_channels,
            "num_states": num_states,
            "heads": heads,
            "reflections": reflections,
            "layers": layers,
        }
        if gated_heads is not None:
            counts["gated_heads"] = gated_heads
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, but is {value!r}")
        if not isinstance(memory_heads, int) or isinstance(memory_heads, bool):
            raise ValueError(f"memory_heads must be an integer, but is {memory_heads!r}")
        transition_heads = heads - memory_heads - (gated_heads or 0)
        if state_channels % heads != 0:
            raise ValueError(f"heads={heads} must divide state_channels={state_channels}")
        if memory_heads < 0 or transition_heads < 0 or transition_heads + memory_heads < 1:
            raise ValueError(
                f"heads={heads} are transition, memory_heads={memory_heads} and "
                f"gated_heads={gated_heads}: at least one must be left to scan, none be missing"
            )
        if layers > transition_heads + (memory_heads > 0):
            raise ValueError(
                f"layers={layers} share {transition_heads} transition heads, and memory heads "
                f"belong to the last: too few for every layer to have one; give more heads"
            )
        if not 0 <= stretch < float("inf"):
            raise ValueError(f"stretch must be a number of at least 0, but is {stretch}")
        if not 0 <= gated_dropout < 1:
            raise ValueError(f"gated_dropout must lie in [0, 1), but is {gated_dropout}")
        check_choice("read", read, ("mean", "routed"))
        check_choice("backend", backend, (*BACKENDS, None))
        if routed and backend == "chunked":
            raise ValueError(
                'routed reflections do not compose into chunks; use backend="reference" or None'
            )
        self.token_channels, self.state_channels = token_channels, state_channels
        self.num_states, self.heads = num_states, heads
        self.head_channels = state_channels // heads
        self.transition_heads, self.memory_heads = transition_heads, memory_heads
        self.gated_heads, self.gated_dropout, self.stretch = gated_heads, gated_dropout, stretch
        self.needs_weights = write or routed or read == "routed"

        self.convolution = TokenConvolution(token_channels) if convolution else None
        self.layers = nn.ModuleList()
        for layer in range(layers):
            share, rest = divmod(transition_heads, layers)
            share += layer < rest  # earlier layers take what is left over
            transition = memory = None
            if share > 0:
                transition = TransitionHeads(
                    token_channels,
                    share,
                    self.head_channels,
                    reflections=reflections,
                    decay=decay,
                    write=write,
                    stretch=stretch,
                )
            if layer == layers - 1 and memory_heads > 0:
                memory = MemoryHeads(
                    token_channels, memory_heads, self.head_channels, num_states, stretch=stretch
                )
            self.layers.append(
                ScanLayer(transition, memory, routed=routed, read=read, backend=backend)
            )
        # What a read means is its direction: sums that grow along the stream must not drown it.
        self.norms = nn.ModuleList(
            nn.LayerNorm(layer.heads * self.head_channels) for layer in self.layers
        )
        # One layer alone is read linearly; several are there because that does not suffice.
        self.mixers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(token_channels + layer.heads * self.head_channels, 2 * token_channels),
                nn.ReLU(),
                nn.Linear(2 * token_channels, token_channels),
            )
            for layer in (self.layers if layers > 1 else ())
        )
        self.lin_read = Linear(self.scanned_channels, token_channels)
        self._has_warned = False

    def reset_parameters(self) -> None:
        self.harden(1.0)
        # Each part resets what is inside it; nothing is drawn twice.
        parts: list[nn.Module] = [*self.norms, self.lin_read]
        if self.convolution is not None:
            parts.append(self.convolution)
        for owner in (*self.layers, *self.mixers):
            parts += owner.children()
        for part in parts:
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def harden(self, share: float) -> None:
        """Sets the gates' stretch to a share of its full value, which it has at first.

        Soft gates learn and hard gates hold: let it grow from 0 to 1 in the course of a training,
        and end at 1. What the gates make of the same logits changes with it.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], but is {share}")
        for layer in self.layers:
            for heads in filter(None, layer.children()):
                heads.stretch.fill_(share * self.stretch)

    def rest_reads(self) -> None:
        """Nobody reads token by token: what only such reads would use is not trained."""
        for part in (self.lin_read, self.norms[-1], *self.mixers[-1:]):
            part.requires_grad_(False)

    @property
    def scanned_channels(self) -> int:
        """Channels of transition and memory heads: the first of each state."""
        return (self.transition_heads + self.memory_heads) * self.head_channels

    @property
    def transition_channels(self) -> int:
        """Channels of transition heads: the very first."""
        return self.transition_heads * self.head_channels

    @property
    def gated_channels(self) -> int:
        """Channels that the gates write: the last of each state."""
        if self.gated_heads is None:
            return self.state_channels
        return self.gated_heads * self.head_channels

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        relation: Relation,
        *,
        weights: Tensor | None = None,
        slots: Tensor | None = None,
        tail: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Runs the forward pass of the module.

        Args:
            x: The pair (tokens, states); tokens of an example stand in their order.
            relation: From tokens to states, complete.
            weights: Routing weights in edge order, for ``write``, ``routed`` and
                ``read="routed"``. (default: :obj:`None`)
            slots: Which slot each state row holds, :math:`(N,)`, or the slots that every example
                holds; ``None`` for slots 0, 1, 2, ... in order. (default: :obj:`None`)
            tail: The token before the first of each example, :math:`(B, C_t)`.
                (default: :obj:`None`)
        """
        tokens, states = x
        check_features(tokens, self.token_channels, "x[0] (tokens)", self.lin_read.weight)
        # States in 16 bits are composed in float32 and rounded again, which warns.
        weight = self.lin_read.weight if states.element_size() > 2 else None
        check_features(states, self.state_channels, "x[1] (states)", weight)
        if not isinstance(relation, Relation) or not relation.is_complete:
            raise ValueError(
                "a scan reads all tokens of an example in order; build the relation with "
                "Relation.complete or Relation.from_batch"
            )
        if relation.size != (tokens.size(0), states.size(0)):
            raise ValueError(
                f"relation goes from {relation.num_src} tokens to {relation.num_dst} states, but x "
                f"has {tokens.size(0)} and {states.size(0)} rows; build it from the same batch"
            )
        if slots is not None:
            targets = relation.targets
            is_one_for_all = targets is not None and slots.shape == (targets.max_count,)
            check_slots(slots, len(slots) if is_one_for_all else states.size(0), self.num_states)
        assert relation.sources is not None
        tokens = self.convolve(tokens, relation.sources, tail)
        hoisted = self.hoist(tokens, relation, weights, slots, reads=True)
        states, reads_BSC = self.advance(states, hoisted, relation)
        assert reads_BSC is not None
        return states, relation.sources.unpad(reads_BSC)

    # Before the loop ############################################################

    def convolve(self, x: Tensor, examples: Partition, tail: Tensor | None = None) -> Tensor:
        """Tokens that know the one before, ``[T, C_t]``; needs each example's tokens in order."""
        return x if self.convolution is None else self.convolution(x, examples, tail)

    def hoist(
        self,
        x: Tensor,
        relation: Relation,
        weights: Tensor | None,
        slots: Tensor | None,
        reads: bool,
    ) -> HoistedScan:
        """Everything that depends on tokens only, for all groups in one call each.

        Args:
            x: Tokens after the convolution, ``[T, C_t]``, group by group.
            relation: Tokens -> (group, state), complete.
            weights: Routing weights of its edges, ``[E]``.
            slots: The slots of one group, ``[N]``, or of all state rows; ``None`` for 0, 1, 2, ...
            reads: Whether tokens are to read.
        """
        if self.needs_weights and weights is None:
            raise ValueError(
                "write, routed and read='routed' need routing weights; pass weights= (a machine "
                "with mix='attention' has none)"
            )
        sources, targets = relation.sources, relation.targets
        assert sources is not None
        assert targets is not None
        counts = targets.ptr.diff()
        mean = targets.mask().to(widen(x).dtype) / counts.clamp(min=1).unsqueeze(1)
        tokens = SegmentTokens(
            x_BSC=sources.pad(x),
            # Later layers meet a batch inside the loop, compiled once for all of them.
            real_BS=sources.mask() if len(self.layers) > 1 or not sources.is_uniform else None,
            weights_BSN=None if weights is None else widen(relation.to_dense(weights)).mT,
            mean_BN=mean,
            slots_BN=self._slot_rows(slots, targets),
        )
        first = self.layers[0].prepare(tokens, reads or len(self.layers) > 1)
        if len(self.layers) == 1:
            return HoistedScan(first, None)
        if tokens.slots_BN is not None:
            all_slots = tokens.slots_BN.expand(sources.num_examples, -1)
            tokens = tokens._replace(slots_BN=all_slots)
        return HoistedScan(first, tokens)

    def _slot_rows(self, slots: Tensor | None, targets: Partition) -> Tensor | None:
        if self.memory_heads == 0:
            return None
        if slots is None:
            if not targets.is_uniform or targets.max_count not in (0, self.num_states):
                raise ValueError(
                    f"memory heads have one key entry for each of the {self.num_states} slots, but "
                    f"examples have {targets.min_count} to {targets.max_count} states; say with "
                    f"slots= which slot each state holds"
                )
            return None
        if targets.is_uniform and slots.numel() == targets.max_count:
            return slots.unsqueeze(0)
        if slots.shape != (targets.num_rows,):
            raise ValueError(
                f"slots must have one entry for each of the {targets.num_rows} states, but has "
                f"shape {tuple(slots.shape)}"
            )
        return targets.pad(slots)

    # Inside the loop ############################################################

    def advance(
        self, states: Tensor, hoisted: HoistedScan, relation: Relation
    ) -> tuple[Tensor, Tensor | None]:
        """States ``[N, C]`` after their segment, and what its tokens read, ``[B, S, C_t]``.

        Examples stand side by side, and S is the length that was hoisted: the longest of a call.
        """
        targets = relation.targets
        assert targets is not None
        padded_BNC = targets.pad(widen(states))
        heads_BNHD = padded_BNC.unflatten(-1, (self.heads, self.head_channels))
        tokens, prepared = hoisted.tokens, hoisted.first
        after: list[Tensor] = []
        reads: list[Tensor] = []
        first = 0
        for index, layer in enumerate(self.layers):
            if index > 0:
                assert tokens is not None
                mixed = self._mix(index - 1, tokens.x_BSC, reads[-1])
                tokens = tokens._replace(x_BSC=tokens.x_BSC + mixed)
                prepared = layer.prepare(tokens, reads=True)
            assert isinstance(layer, ScanLayer)
            own_BNHD = heads_BNHD[:, :, first : first + layer.heads]
            scanned_BNHD, read_BSHD = layer.advance(own_BNHD, prepared)
            after.append(scanned_BNHD)
            first += layer.heads
            if read_BSHD is not None:
                reads.append(self._norm(index, read_BSHD.flatten(2)))
        after.append(heads_BNHD[:, :, first:])
        new = targets.unpad(torch.cat(after, 2).flatten(2))
        new_states = new.to(states.dtype)
        if new_states.dtype != new.dtype and not torch.compiler.is_compiling():
            self._warn_of_drift(new, new_states)
        if len(reads) < len(self.layers):
            return new_states, None
        out_BSC = self.lin_read(torch.cat(reads, dim=-1))
        if tokens is not None:
            out_BSC = out_BSC + self._mix(-1, tokens.x_BSC, reads[-1])
        return new_states, out_BSC

    def read_out(self, read: Tensor) -> Tensor:
        """What tokens read of all scanned heads, to ``[.., C_t]``; of a scan of one layer."""
        return self.lin_read(self._norm(0, read))

    def _norm(self, layer: int, read: Tensor) -> Tensor:
        # Back in the layer's own precision: only states and their maps need more.
        return self.norms[layer](read.to(self.lin_read.weight.dtype))

    def _mix(self, layer: int, x_BSC: Tensor, read_BSX: Tensor) -> Tensor:
        """What a layer's read says about each token, ``[B, S, C_t]``."""
        return self.mixers[layer](torch.cat([x_BSC, read_BSX], dim=-1))

    def _warn_of_drift(self, exact: Tensor, rounded: Tensor) -> None:
        """States in 16 bits lose what reflections keep; said once, with the measured loss."""
        if self._has_warned:
            return
        self._has_warned = True
        drift = (rounded.to(exact.dtype) - exact).norm() / exact.norm().clamp(min=1e-30)
        warnings.warn(
            f"states in {rounded.dtype} lose {drift.item():.1e} of their norm to rounding in every "
            f"segment, and a scan keeps only what is exact; keep the states in float32 (autocast, "
            f"or precision bf16-mixed, does)",
            stacklevel=2,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.token_channels}, {self.state_channels}, transition_heads="
            f"{self.transition_heads}, memory_heads={self.memory_heads}, "
            f"gated_heads={self.gated_heads}"
        )
