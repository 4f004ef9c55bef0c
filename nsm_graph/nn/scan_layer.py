"""One layer of a segment scan: transition and memory heads side by side (X8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm_graph.nn.scan_heads import MemoryHeads, TransitionHeads
from nsm_graph.ops.delta_scan import PreparedScan, prepare, run


class SegmentTokens(NamedTuple):
    """The tokens of B segments side by side, and the states of their examples."""

    x_BSC: Tensor  #: the tokens, zeros where a segment is shorter
    real_BS: Tensor | None  #: which tokens are there; None = all
    weights_BSN: Tensor | None  #: routing weights, where they are needed
    mean_BN: Tensor  #: one over the number of states, zero where an example has fewer
    slots_BN: (
        Tensor | None
    )  #: the slot of each state; one row for all, or one each; None = in order


class PreparedLayer(NamedTuple):
    """What a layer computes before it sees the states."""

    transition: PreparedScan | None
    memory: PreparedScan | None


class ScanLayer(nn.Module):
    """Owns some heads of every state: first those that compose, then those that recall.

    Args:
        transition: Heads that compose; ``None`` for none.
        memory: Heads that recall; ``None`` for none.
        routed: Routing weights gate the reflections.
        read: ``"mean"`` or ``"routed"``, see :class:`~nsm_graph.nn.SegmentScan`.
        backend: Of :func:`~nsm_graph.ops.delta_scan.delta_scan`.
    """

    def __init__(
        self,
        transition: TransitionHeads | None,
        memory: MemoryHeads | None,
        *,
        routed: bool,
        read: str,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.transition, self.memory = transition, memory
        self.routed, self.read, self.backend = routed, read, backend

    @property
    def heads(self) -> int:
        kinds = (self.transition, self.memory)
        return sum(kind.heads for kind in kinds if kind is not None)

    def prepare(self, tokens: SegmentTokens, reads: bool) -> PreparedLayer:
        """Everything that depends on the tokens only."""
        transition = memory = None
        if self.transition is not None:
            weights = tokens.weights_BSN
            steps = self.transition.steps(tokens.x_BSC, weights, weights if self.routed else None)
            weight = None
            if reads:
                mean = tokens.mean_BN.unsqueeze(1).expand(-1, tokens.x_BSC.size(1), -1)
                weight = weights if self.read == "routed" else mean
            transition = prepare(steps.only(tokens.real_BS), weight=weight, backend=self.backend)
        if self.memory is not None:
            mask = tokens.mean_BN > 0 if tokens.slots_BN is not None else None
            steps, query = self.memory.steps(tokens.x_BSC, tokens.slots_BN, mask)
            steps, query_read = steps.only(tokens.real_BS), query if reads else None
            memory = prepare(steps, query=query_read, backend=self.backend)
        return PreparedLayer(transition, memory)

    def advance(self, heads_BNHD: Tensor, prepared: PreparedLayer) -> tuple[Tensor, Tensor | None]:
        """The heads ``[B, N, H, D]`` after the segment, and reads ``[B, S, H, D]``."""
        after, reads = [], []
        first = 0
        if self.transition is not None and prepared.transition is not None:
            first = self.transition.heads
            memory_BHDN = heads_BNHD[:, :, :first].permute(0, 2, 3, 1)
            memory_BHDN, read = run(memory_BHDN, prepared.transition)
            after.append(memory_BHDN.permute(0, 3, 1, 2))
            reads.append(read)
        if self.memory is not None and prepared.memory is not None:
            memory_BHND, read = run(heads_BNHD[:, :, first:].transpose(1, 2), prepared.memory)
            after.append(memory_BHND.transpose(1, 2))
            reads.append(read)
        has_reads = all(read is not None for read in reads)
        return torch.cat(after, 2), torch.cat(reads, 2) if has_reads else None
