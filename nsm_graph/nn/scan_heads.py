"""The two kinds of heads of a segment scan: what each token does to them (X8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.slot_rows import reset_slot_rows
from nsm_graph.ops.delta_scan import DeltaSteps
from nsm_graph.ops.delta_scan.tokens import STRETCH, hard_gate, unit
from nsm_graph.ops.segment import widen


class TransitionHeads(nn.Module):
    r"""Heads that compose: every token reflects all states of its example along its own keys.

    .. math::
        s_j &\leftarrow s_j - \beta_{ir} (k_{ir} \cdot s_j) k_{ir}, \quad r = 1..R,
        \quad k_{ir} = \mathrm{unit}(W_k x_i), \; \beta \in [0, 2] \\
        s_j &\leftarrow \alpha_i s_j + \gamma_i w_{ij} v_i \quad \text{(optional)}

    A product of reflections reaches every orthogonal map, so the order of tokens is kept exactly;
    a token whose gates are closed leaves the states as they are, bit for bit.

    Args:
        token_channels: Size of each token.
        heads: Number of these heads.
        head_channels: Size D of a head.
        reflections: R, reflections of each token.
        decay: Whether tokens decay the states (:math:`\alpha`).
        write: Whether tokens write through routing weights (:math:`\gamma w v`).
        stretch: Of the gates, see :func:`~nsm_graph.ops.delta_scan.tokens.hard_gate`.
            (default: :obj:`0.5`)
    """

    stretch: Tensor

    def __init__(
        self,
        token_channels: int,
        heads: int,
        head_channels: int,
        *,
        reflections: int,
        decay: bool,
        write: bool,
        stretch: float = STRETCH,
    ) -> None:
        super().__init__()
        # A buffer, since it may grow in training: it belongs to what was learned with it.
        self.register_buffer("stretch", torch.tensor(float(stretch)))
        self.heads, self.head_channels, self.reflections = heads, head_channels, reflections
        self.lin_key = Linear(token_channels, heads * reflections * head_channels)
        self.lin_beta = Linear(token_channels, heads * reflections)
        self.lin_decay = Linear(token_channels, heads) if decay else None
        self.lin_value = Linear(token_channels, heads * head_channels) if write else None
        self.lin_write = Linear(token_channels, heads) if write else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in self.children():
            linear.reset_parameters()
        # Half open: what a token does to the states is to be learned.
        nn.init.zeros_(self.lin_beta.bias)
        # Almost open and almost closed. Up to a stretch of 0.5 they are not cut off, and learn;
        # with more they are, unless the scan is hardened from soft gates on.
        if self.lin_decay is not None:
            nn.init.constant_(self.lin_decay.bias, 1.0)
        if self.lin_write is not None:
            nn.init.constant_(self.lin_write.bias, -1.0)

    def steps(
        self, x_BSC: Tensor, weights_BSN: Tensor | None, gate_BSN: Tensor | None
    ) -> DeltaSteps:
        """What tokens do to memories of D rows and one column for each state."""
        heads, width = self.heads, self.head_channels
        # In 16 bits a key is no unit vector and a reflection no reflection: float32 from here on.
        key = unit(widen(self.lin_key(x_BSC)).unflatten(-1, (heads, self.reflections, width)))
        beta = 2 * hard_gate(widen(self.lin_beta(x_BSC)), self.stretch)
        beta = beta.unflatten(-1, (heads, self.reflections))
        decay = row = column = None
        if self.lin_decay is not None:
            decay = hard_gate(widen(self.lin_decay(x_BSC)), self.stretch)
        if self.lin_value is not None and self.lin_write is not None:
            write = hard_gate(widen(self.lin_write(x_BSC)), self.stretch).unsqueeze(-1)
            row = write * widen(self.lin_value(x_BSC)).unflatten(-1, (heads, width))
            column = weights_BSN
        return DeltaSteps(key, beta, None, decay, row, column, gate_BSN)


class MemoryHeads(nn.Module):
    r"""Heads that recall: a delta rule along the states, with one key entry for each slot.

    .. math::
        S \leftarrow S + \beta_i k_i (v_i - S^\top k_i)^\top, \qquad
        y_i = S^\top q_i, \qquad k_i, q_i \in \mathbb{R}^N \text{ signed, of unit norm}

    Keys and queries are cut to the active slots of an example and normalised there.

    Args:
        token_channels: Size of each token.
        heads: Number of these heads.
        head_channels: Size D of a head.
        num_states: Number of slots.
        stretch: Of the gates, see :func:`~nsm_graph.ops.delta_scan.tokens.hard_gate`.
            (default: :obj:`0.5`)
    """

    stretch: Tensor

    #: Tensors indexed by slot; slots come first, heads within a slot.
    slot_dims = {
        "lin_key.weight": 0,
        "lin_key.bias": 0,
        "lin_query.weight": 0,
        "lin_query.bias": 0,
    }

    def __init__(
        self,
        token_channels: int,
        heads: int,
        head_channels: int,
        num_states: int,
        *,
        stretch: float = STRETCH,
    ) -> None:
        super().__init__()
        self.register_buffer("stretch", torch.tensor(float(stretch)))
        self.heads, self.head_channels, self.num_states = heads, head_channels, num_states
        self.lin_key = Linear(token_channels, num_states * heads)
        self.lin_query = Linear(token_channels, num_states * heads)
        self.lin_value = Linear(token_channels, heads * head_channels)
        self.lin_beta = Linear(token_channels, heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in self.children():
            linear.reset_parameters()
        nn.init.zeros_(self.lin_beta.bias)

    def reset_slots(self, slots: Tensor) -> None:
        """Fresh rows of keys and queries for slots that were just allocated."""
        for linear in (self.lin_key, self.lin_query):
            reset_slot_rows(linear, slots, self.num_states)

    def steps(
        self, x_BSC: Tensor, slots_BN: Tensor | None, mask_BN: Tensor | None
    ) -> tuple[DeltaSteps, Tensor]:
        """What tokens do to memories of one row for each state and D columns, and their queries.

        Args:
            x_BSC: The tokens.
            slots_BN: The slot of each state; one row for all examples or one each; ``None`` for
                all slots in order.
            mask_BN: Which states exist, where examples have different numbers of them.
        """
        key = self._entries(widen(self.lin_key(x_BSC)), slots_BN, mask_BN)
        query = self._entries(widen(self.lin_query(x_BSC)), slots_BN, mask_BN)
        value = widen(self.lin_value(x_BSC)).unflatten(-1, (self.heads, 1, self.head_channels))
        beta = hard_gate(widen(self.lin_beta(x_BSC)), self.stretch).unsqueeze(-1)
        return DeltaSteps(key.unsqueeze(3), beta, value), query

    def _entries(self, table: Tensor, slots_BN: Tensor | None, mask_BN: Tensor | None) -> Tensor:
        """``[B, S, M heads]`` -> unit vectors ``[B, S, heads, N]``."""
        table_BSMH = table.unflatten(-1, (self.num_states, self.heads))
        if slots_BN is not None and slots_BN.size(0) == 1:
            table_BSMH = table_BSMH[:, :, slots_BN[0]]
        elif slots_BN is not None:
            index = slots_BN[:, None, :, None].expand(-1, table.size(1), -1, self.heads)
            table_BSMH = table_BSMH.gather(2, index)
        if mask_BN is not None:
            table_BSMH = table_BSMH * mask_BN[:, None, :, None]
        return unit(table_BSMH.transpose(2, 3))
