"""State propagation: the gates (N5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.checks import check_choice, check_features


class Propagated(NamedTuple):
    """What a propagation step gives."""

    state: Tensor  #: ``[N, C]``, the new states
    cell: Tensor | None  #: ``[N, C]``, the new LSTM cell; ``None`` for a GRU
    gates: dict[str, Tensor]  #: each gate ``[N, C]`` by name


class StatePropagator(nn.Module):
    r"""Updates every state from its input through gates.

    .. math::
        \text{gru:}\quad r &= \sigma(W_r [s, u]), \; z = \sigma(W_z [s, u]), \;
        c = \tanh(W_c [r \odot s, u]), \; s' = (1 - z) \odot s + z \odot c \\
        \text{lstm:}\quad i, f, o &= \sigma(W [s, u]), \; g = \tanh(W_g [s, u]), \;
        c' = f \odot c + i \odot g, \; s' = o \odot \tanh c'

    Source: Neural State Machine flow, 3.3. Note the convention: z opens towards the candidate and r
    acts before the matrix; :class:`torch.nn.GRUCell` has both the other way. The LSTM is the second
    cell that the document names without equations; its forget gate starts with bias 1.

    Args:
        state_channels: Size of each state.
        cell: ``"gru"`` or ``"lstm"``. (default: :obj:`"gru"`)
        input_channels: Size of each input; ``None`` for that of a state. (default: :obj:`None`)

    Shapes:
        - **input:** states :math:`(N, C)`, inputs :math:`(N, C_u)`, for an LSTM the cell
          :math:`(N, C)`, mask :math:`(N,)`
        - **output:** :class:`Propagated`: state, cell and gates, each :math:`(N, C)`

    Raises:
        ValueError: If shapes disagree, or an LSTM gets no cell.

    Example:
        >>> propagator = StatePropagator(16)
        >>> step = propagator(torch.zeros(6, 16), torch.randn(6, 16))
        >>> step.state.shape, sorted(step.gates)
        (torch.Size([6, 16]), ['candidate', 'reset', 'update'])
    """

    def __init__(
        self, state_channels: int, *, cell: str = "gru", input_channels: int | None = None
    ) -> None:
        super().__init__()
        check_choice("cell", cell, ("gru", "lstm"))
        if state_channels < 1:
            raise ValueError(f"state_channels must be positive, but is {state_channels}")
        if input_channels is not None and input_channels < 1:
            raise ValueError(f"input_channels must be positive, but is {input_channels}")
        self.state_channels = state_channels
        self.input_channels = state_channels if input_channels is None else input_channels
        self.cell = cell
        width = state_channels + self.input_channels
        if cell == "gru":
            self.lin_gates = Linear(width, 2 * state_channels)
            self.lin_candidate = Linear(width, state_channels)
        else:
            self.lin_gates = Linear(width, 4 * state_channels)
            self.lin_candidate = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.lin_gates.reset_parameters()
        if self.lin_candidate is not None:
            self.lin_candidate.reset_parameters()
        else:
            # Gates stand in the order input, forget, output, candidate.
            forget = slice(self.state_channels, 2 * self.state_channels)
            nn.init.ones_(self.lin_gates.bias[forget])

    def forward(
        self,
        state: Tensor,
        update: Tensor,
        cell: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Propagated:
        r"""Runs the forward pass of the module.

        Args:
            state: The states s.
            update: The inputs u.
            cell: The LSTM's cell c. (default: :obj:`None`)
            mask: Rows to update; the others keep their value bit for bit. (default: :obj:`None`)
        """
        check_features(state, self.state_channels, "state", self.lin_gates.weight)
        check_features(update, self.input_channels, "update", self.lin_gates.weight)
        if update.size(0) != state.size(0):
            raise ValueError(f"update has {update.size(0)} rows, but state has {state.size(0)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != state.shape[:1]):
            raise ValueError(
                f"mask must hold one bool for each of the {state.size(0)} states, but has shape "
                f"{tuple(mask.shape)} and dtype {mask.dtype}"
            )
        if self.cell == "gru":
            step = self._gru(state, update)
        else:
            if cell is None or cell.shape != state.shape:
                got = None if cell is None else tuple(cell.shape)
                raise ValueError(
                    f"an LSTM carries a cell of shape {tuple(state.shape)}, but cell is {got}; "
                    f"start with zeros"
                )
            step = self._lstm(state, update, cell)
        if mask is None:
            return step
        mask = mask.unsqueeze(-1)
        kept_cell = None if step.cell is None else torch.where(mask, step.cell, cell)
        return Propagated(torch.where(mask, step.state, state), kept_cell, step.gates)

    def _gru(self, state: Tensor, update: Tensor) -> Propagated:
        assert self.lin_candidate is not None
        gates = self.lin_gates(torch.cat([state, update], dim=-1)).sigmoid()
        r, z = gates.chunk(2, dim=-1)
        c = self.lin_candidate(torch.cat([r * state, update], dim=-1)).tanh()
        new = (1 - z) * state + z * c
        return Propagated(new, None, {"reset": r, "update": z, "candidate": c})

    def _lstm(self, state: Tensor, update: Tensor, cell: Tensor) -> Propagated:
        i, f, o, g = self.lin_gates(torch.cat([state, update], dim=-1)).chunk(4, dim=-1)
        i, f, o, g = i.sigmoid(), f.sigmoid(), o.sigmoid(), g.tanh()
        new_cell = f * cell + i * g
        gates = {"input": i, "forget": f, "output": o, "candidate": g}
        return Propagated(o * new_cell.tanh(), new_cell, gates)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.state_channels}, cell={self.cell!r})"
