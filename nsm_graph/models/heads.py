"""From states (and tokens) to predictions (N8, X1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn import StatePool, TokenReadout
from nsm_graph.nn.edge_attention_layer import hide_from_explainers
from nsm_graph.relation import Relation

HEADS = ("example", "token", "next_token")


class ExampleHead(nn.Module):
    r"""One prediction per example: pool the states, project.

    .. math:: y_b = W \, \mathrm{pool}(\{s_j\}_{j \in b}) + b

    Serves classification (logits) and regression (values) alike.

    Args:
        state_channels: Size of each state.
        num_states: Number of slots.
        out_channels: Size of each prediction.
        pool: Mode of :class:`~nsm_graph.nn.StatePool`.
        dropout: Dropout of the pooled vector.
    """

    def __init__(
        self, state_channels: int, num_states: int, out_channels: int, pool: str, dropout: float
    ) -> None:
        super().__init__()
        self.num_states = num_states
        self.pool = StatePool(pool, state_channels=state_channels, num_states=num_states)
        self.dropout = nn.Dropout(dropout)
        self.lin_out = Linear(self.pool.out_channels(state_channels), out_channels)
        # Flattening gives every slot its own columns: they follow edits of the node set.
        self.slot_dims = {"lin_out.weight": 1} if pool == "flatten" else {}

    def reset_parameters(self) -> None:
        self.pool.reset_parameters()
        self.lin_out.reset_parameters()

    def reset_slots(self, slots: Tensor) -> None:
        """Fresh columns for slots that were just allocated."""
        weight = self.lin_out.weight
        fresh = torch.empty_like(weight)
        nn.init.kaiming_uniform_(fresh, a=5**0.5)
        shape = (self.num_states, -1)
        with torch.no_grad():
            weight.unflatten(1, shape)[:, slots] = fresh.unflatten(1, shape)[:, slots]

    def forward(
        self,
        states: Tensor,
        batch: Tensor,
        batch_size: int,
        slots: Tensor,
        presence: Tensor | None = None,
    ) -> Tensor:
        """Predictions ``[B, out]`` from states with their examples, slots and presence ``[N]``."""
        pooled = self.pool(states, batch, batch_size, slots=slots, weight=presence)
        return self.lin_out(self.dropout(pooled))


class TokenHead(nn.Module):
    r"""One prediction per token: the token, what it reads from the states, project.

    .. math::
        y_i &= W \, \mathrm{LayerNorm}\big(x_i + \mathrm{read}_i\big) + b \\
        y_i &= W \, \mathrm{LayerNorm}\big(g_x \odot x_i + g_r \odot \mathrm{read}_i
        + \mathrm{scan}_i\big) + b \quad \text{with a scan}

    The gains :math:`g` start at zero: what the scan reads comes first, and the rest joins where it
    helps.

    With ``causal=True`` (next-token prediction) the token reads the states as they were before its
    segment, so that no later token can be seen; with ``segment_length=1`` that is every earlier
    token. Otherwise it reads the states as they are after its segment.

    Args:
        token_channels: Size of each token.
        state_channels: Size of each state.
        out_channels: Size of each prediction.
        heads: Number of heads of the read-out.
        causal: Read the states from before the token's segment.
        dropout: Dropout of the combined vector.
        has_scan: Tokens also read from a scan.
        output: Instead of a projection of its own, such as tied embeddings.
    """

    def __init__(
        self,
        token_channels: int,
        state_channels: int,
        out_channels: int,
        heads: int,
        causal: bool,
        dropout: float,
        has_scan: bool,
        output: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(2, token_channels)) if has_scan else None
        self.readout = TokenReadout(token_channels, state_channels, heads, causal=causal)
        hide_from_explainers(self.readout)
        self.norm = nn.LayerNorm(token_channels)
        self.dropout = nn.Dropout(dropout)
        self.lin_out = Linear(token_channels, out_channels) if output is None else output

    def reset_parameters(self) -> None:
        for module in (self.readout, self.norm, self.lin_out):
            module.reset_parameters()
        if self.gains is not None:
            nn.init.zeros_(self.gains)

    @property
    def causal(self) -> bool:
        return self.readout.causal

    def forward(
        self,
        x: Tensor,
        states: Tensor,
        relation: Relation,
        reads: Tensor | None,
        place: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predictions ``[P, out]`` and token read-outs ``[T, C_t]``.

        Args:
            x: The tokens.
            states: The states that the tokens may see.
            relation: States -> tokens.
            reads: The scan's per-token reads; a scan reads in order, hence causally.
            place: ``[P]``, which tokens to predict for; ``None`` for all, in order.
            bias: ``[E]``, added to the scores of the read-out.
        """
        read = self.readout((states, x), relation, bias=bias)
        if self.gains is not None and reads is not None:
            tokens = self.norm(self.gains[0] * x + self.gains[1] * read + reads)
        else:
            tokens = self.norm(x + read)
        asked = tokens if place is None else tokens[place]
        return self.lin_out(self.dropout(asked)), tokens
