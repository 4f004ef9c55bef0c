"""What is read from the states: one vector per example (N8), one per token (X1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.utils import scatter, softmax

from nsm_graph.nn.checks import check_channels, check_choice, check_features
from nsm_graph.nn.edge_attention_layer import EdgeAttentionLayer, with_weights
from nsm_graph.ops.segment import group_sum
from nsm_graph.relation import Relation


class StatePool(nn.Module):
    r"""Pools the active states of each example into one vector.

    .. math::
        \text{mean:}\; \frac{1}{N_b} \sum_j s_j \qquad
        \text{flatten:}\; \Vert_{m=1}^{M} s_{\mathrm{slot}=m} \qquad
        \text{attention:}\; \sum_j \mathrm{softmax}_j(g \cdot s_j) \, s_j

    With weights :math:`p_j` the mean is :math:`\sum_j p_j s_j / \sum_j p_j`, flattened states are
    scaled by them, and :math:`\log p_j` is added to the scores of attention.

    Source: Neural State Machine flow, step 4; attention pooling is ours. Flatten always has the
    width of all M slots, with zeros where a slot is inactive, so that the width does not depend on
    the mask.

    Args:
        mode: ``"mean"``, ``"flatten"`` or ``"attention"``. (default: :obj:`"mean"`)
        state_channels: Size of each state; needed for ``"attention"``. (default: :obj:`None`)
        num_states: Number of slots M; needed for ``"flatten"``. (default: :obj:`None`)

    Shapes:
        - **input:** states :math:`(N, C)`, batch :math:`(N,)`, slots :math:`(N,)`
        - **output:** :math:`(B, C)`, or :math:`(B, M C)` for ``"flatten"``

    Example:
        >>> StatePool("mean")(torch.ones(4, 8), torch.tensor([0, 0, 1, 1])).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        mode: str = "mean",
        *,
        state_channels: int | None = None,
        num_states: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("mean", "flatten", "attention"))
        if mode == "attention" and state_channels is None:
            raise ValueError('mode "attention" needs state_channels; pass the size of a state')
        if mode == "flatten" and (num_states is None or num_states < 1):
            raise ValueError('mode "flatten" needs num_states; pass the number of slots')
        self.mode = mode
        self.num_states = num_states
        self.lin_gate = Linear(state_channels or 0, 1, bias=False) if mode == "attention" else None

    def reset_parameters(self) -> None:
        if self.lin_gate is not None:
            self.lin_gate.reset_parameters()

    def out_channels(self, state_channels: int) -> int:
        """Width of the pooled vector for states of the given size."""
        return state_channels * (self.num_states or 1 if self.mode == "flatten" else 1)

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        batch_size: int | None = None,
        *,
        slots: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        r"""Runs the forward pass of the module.

        Args:
            x: The states.
            batch: The example of each state; ``None`` for a single example.
                (default: :obj:`None`)
            batch_size: Number of examples. (default: :obj:`None`)
            slots: The slot of each state, needed for ``"flatten"`` unless every example holds all
                slots in order. (default: :obj:`None`)
            weight: How much each state counts, 0 or more; ``None`` for all alike. A factor that
                all share makes a difference to ``"flatten"`` only. (default: :obj:`None`)
        """
        check_features(x, -1, "x")
        if weight is not None:
            _check_weight(weight, x)
        if batch is None:
            if batch_size not in (None, 1):
                raise ValueError(
                    f"{batch_size} examples need batch=, which says whose each state is"
                )
            batch, batch_size = x.new_zeros(x.size(0), dtype=torch.long), 1
        elif batch.shape != x.shape[:1]:
            raise ValueError(
                f"batch must have one entry per state, {x.size(0)}, but has {tuple(batch.shape)}"
            )
        if batch_size is None:
            batch_size = int(batch.max()) + 1 if batch.numel() > 0 else 0
        if self.mode == "flatten":
            rows = x if weight is None else x * weight.unsqueeze(1)
            return self._flatten(rows, batch, batch_size, slots)
        if self.lin_gate is None:
            if weight is None:
                return scatter(x, batch, dim=0, dim_size=batch_size, reduce="mean")
            total = group_sum(x * weight.unsqueeze(1), batch, batch_size)
            share = group_sum(weight, batch, batch_size).unsqueeze(1)
            return total / share.clamp(min=torch.finfo(share.dtype).tiny)
        score = self.lin_gate(x)
        if weight is not None:
            tiny = torch.finfo(weight.dtype).tiny
            score = score + weight.clamp(min=tiny).log().unsqueeze(1)
        weights = softmax(score, batch, num_nodes=batch_size)
        return scatter(x * weights, batch, dim=0, dim_size=batch_size, reduce="sum")

    def _flatten(self, x: Tensor, batch: Tensor, batch_size: int, slots: Tensor | None) -> Tensor:
        assert self.num_states is not None
        if slots is None:
            if x.size(0) != batch_size * self.num_states:
                raise ValueError(
                    f"{x.size(0)} states are not {batch_size} examples of {self.num_states} slots; "
                    f"say with slots= which slot each state holds"
                )
            # The i-th state of an example holds slot i, in whatever order examples stand.
            order = torch.argsort(batch, stable=True)
            slots = torch.empty_like(order)
            slots[order] = torch.arange(x.size(0), device=x.device) % self.num_states
        elif slots.shape != x.shape[:1]:
            raise ValueError(
                f"slots must have one entry per state, {x.size(0)}, but has {tuple(slots.shape)}"
            )
        place = batch * self.num_states + slots
        if not torch.compiler.is_compiling():
            self._check_places(place, slots)
        flat = x.new_zeros(batch_size * self.num_states, x.size(1))
        return flat.index_copy(0, place, x).view(batch_size, -1)

    def _check_places(self, place: Tensor, slots: Tensor) -> None:
        if bool(((slots < 0) | (slots >= self.num_states)).any()):
            raise ValueError(
                f"slots must lie in 0..{self.num_states - 1}, but go from {int(slots.min())} to "
                f"{int(slots.max())}"
            )
        if place.unique().numel() != place.numel():
            raise ValueError(
                "two states of one example hold the same slot; say with slots= and batch= which "
                "state is which"
            )

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.mode!r})"


def _check_weight(weight: Tensor, x: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.shape != x.shape[:1]:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must have one entry per state, {x.size(0)}, but has {shape}")
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, but has dtype {weight.dtype}")
    if not torch.compiler.is_compiling() and not bool((weight >= 0).all()):
        raise ValueError("weight must not be negative or NaN")


class TokenReadout(EdgeAttentionLayer):
    r"""The read path: every token attends to the states of its example.

    .. math::
        y_i = W_o \, \mathrm{MHA}\big(\text{query} = x_i,\;
        \text{keys, values} = \{s_j : j \to i\}\big)

    Source: ours (X1). With ``causal=True`` the machine hands it the states as they were before the
    token's segment was read, otherwise as they are after it.

    Args:
        token_channels: Size of each token, or :obj:`-1` to derive the size from the first input.
        state_channels: Size of each state.
        heads: Number of heads; divides ``state_channels``. (default: :obj:`4`)
        causal: Read the states from before the token's segment. (default: :obj:`False`)
        out_channels: Size of each read-out; ``None`` for that of a token. (default: :obj:`None`)

    Shapes:
        - **input:** the pair of states :math:`(N, C)` and tokens :math:`(T, C_t)`, edges from
          states to tokens
        - **output:** read-outs :math:`(T, C_{out})`, with weights :math:`(E, H)` if asked for

    Raises:
        ValueError: If sizes, types or the relation disagree.

    Example:
        >>> readout = TokenReadout(8, 16)
        >>> relation = Relation.complete([0, 3, 6], [0, 5, 7])   # states -> tokens
        >>> readout((torch.randn(6, 16), torch.randn(7, 8)), relation).shape
        torch.Size([7, 8])
    """

    def __init__(
        self,
        token_channels: int,
        state_channels: int,
        heads: int = 4,
        *,
        causal: bool = False,
        out_channels: int | None = None,
    ) -> None:
        check_channels(token_channels=token_channels)
        out_channels = token_channels if out_channels is None else out_channels
        if out_channels < 1:
            raise ValueError(
                "out_channels must be given where token_channels is inferred (-1); pass the size "
                "of a read-out"
            )
        super().__init__(state_channels, heads)
        self.token_channels, self.state_channels = token_channels, state_channels
        self.out_channels = out_channels
        self.causal = causal
        self.lin_query = Linear(token_channels, state_channels)
        self.lin_state = Linear(state_channels, 2 * state_channels)
        self.lin_out = Linear(state_channels, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for linear in (self.lin_query, self.lin_state, self.lin_out):
            linear.reset_parameters()

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        edge_index: Tensor | Relation,
        *,
        bias: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        r"""Runs the forward pass of the module.

        Args:
            x: The pair (states, tokens): sources above, targets below, as PyG has it.
            edge_index: Edges from states to tokens.
            bias: Added to the scores, in edge order. (default: :obj:`None`)
            return_attention_weights: If :obj:`True`, also returns ``(edge_index, weights)``.
                (default: :obj:`None`)
        """
        states, tokens = x
        check_features(states, self.state_channels, "x[0] (states)", self.lin_query.weight)
        check_features(tokens, self.token_channels, "x[1] (tokens)", self.lin_query.weight)
        key, value = self.lin_state(states).chunk(2, dim=-1)
        query = self.lin_query(tokens)
        out, alpha = self.attend(query, key, value, edge_index, bias, return_attention_weights)
        return with_weights(self.lin_out(out), edge_index, alpha, return_attention_weights)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.token_channels}, {self.state_channels}, "
            f"heads={self.heads}, causal={self.causal})"
        )
