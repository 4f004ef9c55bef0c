"""Node sets that differ from example to example: who founds a state, and which states stay (X4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.checks import check_channels, check_choice
from nsm_graph.ops.segment import group_sum
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation

GATES = ("straight_through", "continuous")


class Founding(NamedTuple):
    """Which tokens found a state."""

    is_founder: Tensor  #: ``[T]``, bool
    gate: Tensor  #: ``[T]``, how present the state of each founder is; 1 with straight-through
    logit: Tensor  #: ``[T]``, of founding; positive where nothing that is known explains the token


class Staying(NamedTuple):
    """Which states stay."""

    stays: Tensor  #: ``[N]``, bool
    logit: Tensor  #: ``[N]``, of staying


class StateAllocator(nn.Module):
    r"""Gives every example a node set of its own: tokens that no state explains found one.

    Tokens have addresses, and a state keeps the address of the token that founded it, bit for bit,
    in its first ``address_channels`` channels: the gates read them and never write them.

    .. math::
        k_i &= W_a x_i / \lVert W_a x_i \rVert, \qquad
        m_{ij} = \tau \, k_i \cdot a_j / \lVert a_j \rVert \\
        f_i &= \sigma\Big(\theta - \log \sum_{j \in \text{states}} p_j e^{m_{ij}}
        - \ldots_{\, i' < i \text{ founded in this segment}}\Big), \qquad
        i \text{ founds} \iff f_i > \tfrac{1}{2} \\
        r_j &= \sigma(w \cdot s_j + b), \qquad j \text{ stays} \iff r_j > \tfrac{1}{2}, \qquad
        p_j = f_{\mathrm{founder}(j)} \prod_{\text{segments}} r_j

    The match :math:`m_{ij}` is added to the router's logits, so that a token is written to the
    state that explains it. Tokens are asked in order, and those that founded a state earlier in the
    segment explain later ones: where segments end makes no difference. In training tokens found
    with probability :math:`f_i`, in use where it exceeds one half.

    Gradients pass both decisions through the presence :math:`p_j`, which acts wherever a state is
    looked at: :math:`\log p_j` is added to the scores of routing and of read-outs, and pooling
    weighs by it. With ``gate="straight_through"`` it is 1 in the forward pass, and only its
    gradient is that of :math:`p_j`; with ``"continuous"`` it is :math:`p_j` itself. A softmax that
    is sure of a state does not feel a little less of its presence, so a loss that charges for
    states charges for the reads that would be lost with them, too:
    :meth:`nsm_graph.models.state.MachineState.memory_cost`.

    Source: ours (X4); the document's allocation and pruning concern all examples alike.

    Args:
        token_channels: Size of each token.
        state_channels: Size of each state, its address included.
        address_channels: Channels of an address; fewer than ``state_channels``.
            (default: :obj:`16`)
        gate: ``"straight_through"`` or ``"continuous"``. (default: :obj:`"straight_through"`)
        prune: Whether states can leave again; ``allocator.prune = False`` keeps all of them from
            then on. (default: :obj:`True`)
        match_scale: Where :math:`\tau` starts. (default: :obj:`12.0`)
        novelty: Where :math:`\theta` starts, as a share of :math:`\tau`: tokens that match no state
            better than that found one. (default: :obj:`0.5`)
        budget: States that an example shall have on average, at most: a threshold on
            :math:`f_i` rises in training until they do; ``None`` for no limit.
            (default: :obj:`None`)

    Shapes:
        - **address:** tokens :math:`(T, C_t)` to :math:`(T, A)`
        - **match:** addresses :math:`(T, A)`, states :math:`(N, C)`, E edges to :math:`(E,)`

    Raises:
        ValueError: If a size or an option is out of range.

    Example:
        >>> allocator = StateAllocator(8, 16, address_channels=4)
        >>> relation = Relation.complete([0, 5], [0, 3])
        >>> address = allocator.address(torch.randn(5, 8))
        >>> allocator.match(address, torch.randn(3, 16), relation).shape
        torch.Size([15])
    """

    #: Added to the novelty in training so that the average number of states meets the budget.
    restraint: Tensor

    def __init__(
        self,
        token_channels: int,
        state_channels: int,
        *,
        address_channels: int = 16,
        gate: str = "straight_through",
        prune: bool = True,
        match_scale: float = 12.0,
        novelty: float = 0.5,
        budget: float | None = None,
    ) -> None:
        super().__init__()
        check_channels(token_channels=token_channels)
        check_choice("gate", gate, GATES)
        if not 0 < address_channels < state_channels:
            raise ValueError(
                f"address_channels must be positive and leave channels for what a state holds, so "
                f"1..{state_channels - 1}, but is {address_channels}"
            )
        if match_scale <= 0:
            raise ValueError(f"match_scale must be positive, but is {match_scale}")
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be at least 1 state, or None, but is {budget}")
        self.token_channels, self.state_channels = token_channels, state_channels
        self.address_channels = address_channels
        self.gate, self.prune, self.budget = gate, prune, budget
        self.initial_scale, self.initial_novelty = float(match_scale), float(novelty)
        self.lin_address = Linear(token_channels, address_channels, bias=False)
        self.lin_keep = Linear(state_channels, 1) if prune else None
        self.log_scale = nn.Parameter(torch.empty(()))
        self.novelty = nn.Parameter(torch.empty(()))
        self.register_buffer("restraint", torch.zeros(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.lin_address.reset_parameters()
        if self.lin_keep is not None:
            # Everybody stays at first; whom nobody needs is learned.
            nn.init.zeros_(self.lin_keep.weight)
            nn.init.constant_(self.lin_keep.bias, 2.0)
        nn.init.constant_(self.log_scale, math.log(self.initial_scale))
        nn.init.constant_(self.novelty, self.initial_novelty * self.initial_scale)
        self.restraint.zero_()

    def address(self, x: Tensor) -> Tensor:
        """Addresses of tokens, ``[T, A]``, of length 1."""
        return F.normalize(self.lin_address(x), dim=-1)

    def match(self, address: Tensor, states: Tensor, relation: Relation) -> Tensor:
        """How well states explain tokens, ``[E]``, for every edge from a token to a state."""
        known = F.normalize(states[:, : self.address_channels], dim=-1)
        src, dst = relation.edge_index
        return self.log_scale.exp() * (address[src] * known[dst]).sum(-1)

    def keep(self, states: Tensor) -> Tensor | None:
        r"""The gates of states that stay, of :math:`r_j`, ``[N]``; None where all do."""
        if self.lin_keep is None or not self.prune:
            return None
        return self._pass(self.lin_keep(states).squeeze(-1).sigmoid())

    def _pass(self, probability: Tensor) -> Tensor:
        """The gate of a decision that was taken: 1 with straight-through, else its probability."""
        if self.gate == "continuous":
            return probability
        return probability / probability.detach()

    # Who comes ##################################################################

    def found(
        self, address: Tensor, explained: Tensor, tokens: Partition, room: Tensor
    ) -> Founding:
        r"""Asks the tokens of a segment, in order, whether they found a state.

        Args:
            address: Of the tokens, ``[T, A]``.
            explained: :math:`\log \sum_j p_j e^{m_{ij}}` over the states there are, ``[T]``.
            tokens: How the tokens fall into examples.
            room: How many states each example can still take, ``[B]``.
        """
        scale = self.log_scale.exp()
        place = torch.arange(tokens.max_count, device=address.device)
        address_BSA, explained_BS = tokens.pad(address), tokens.pad(explained)
        is_token_BS = tokens.mask()
        match_BSS = scale * (address_BSA @ address_BSA.mT)
        noise_BS = torch.zeros_like(explained_BS)
        if self.training:
            uniform = torch.rand_like(explained_BS).clamp(1e-6, 1 - 1e-6)
            noise_BS = uniform.logit()

        logits: list[Tensor] = []
        founders: list[Tensor] = []
        gates: list[Tensor] = []
        for i in place.tolist():
            total = explained_BS[:, i]
            if i > 0:
                # Nobody who did not found a state explains anything.
                gate = torch.stack(gates, 1).log()
                earlier = (match_BSS[:, i, :i] + gate).masked_fill(
                    ~torch.stack(founders, 1), -torch.inf
                )
                total = torch.logsumexp(torch.cat([total.unsqueeze(1), earlier], 1), dim=1)
            logit = self.novelty - self.restraint - total
            founds = (logit + noise_BS[:, i] > 0) & is_token_BS[:, i] & (room > 0)
            room = room - founds.long()
            logits.append(logit)
            founders.append(founds)
            gates.append(self._pass(logit.sigmoid()))
        if not logits:
            nothing = explained.new_zeros(0)
            return Founding(nothing.bool(), nothing, nothing)
        columns = (torch.stack(rows, 1) for rows in (founders, gates, logits))
        return Founding(*(tokens.unpad(rows) for rows in columns))

    def explained(self, match: Tensor, presence: Tensor, relation: Relation) -> Tensor:
        r""":math:`\log \sum_j p_j e^{m_{ij}}` over the states of each token's example, ``[T]``."""
        src, dst = relation.edge_index
        # A match is a cosine times the scale, so the highest possible one is known.
        top = self.log_scale.exp()
        total = group_sum((match - top).exp() * presence[dst], src, relation.num_src)
        return total.clamp(min=torch.finfo(total.dtype).tiny).log() + top

    # Who stays ##################################################################

    def stays(self, states: Tensor, nodes: Partition, min_states: int) -> Staying:
        """Which states stay in the node sets of their examples.

        The best ``min_states`` of every example always do.
        """
        if self.lin_keep is None or not self.prune:
            logit = torch.full_like(states[:, 0], torch.inf)
            return Staying(logit > 0, logit)
        logit = self.lin_keep(states.detach()).detach().squeeze(-1)
        tried = logit
        if self.training:
            # A little noise: what is near the border tries both sides.
            tried = logit + 0.25 * torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
        order = torch.argsort(tried, descending=True, stable=True)
        order = order[torch.argsort(nodes.batch[order], stable=True)]
        is_best = torch.empty_like(order, dtype=torch.bool)
        is_best[order] = nodes.place < min_states
        return Staying((tried > 0) | is_best, logit)

    # What it may cost ###########################################################

    @torch.no_grad()
    def restrain(self, num_states: float, rate: float = 0.05) -> None:
        """Moves the threshold of founding by how far an average number of states is over budget."""
        if self.budget is not None:
            over = (num_states - self.budget) / self.budget
            self.restraint.add_(rate * over).clamp_(min=0)

    def extra_repr(self) -> str:
        budget = "" if self.budget is None else f", budget={self.budget}"
        return (
            f"{self.token_channels}, {self.state_channels}, "
            f"address_channels={self.address_channels}, gate={self.gate!r}{budget}"
        )
