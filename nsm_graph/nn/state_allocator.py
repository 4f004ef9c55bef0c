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
    log_gate: Tensor  #: ``[T]``, how present the state of each founder is; 0 with straight-through
    logit: Tensor  #: ``[T]``, of founding; positive where nothing that is known explains the token


class Staying(NamedTuple):
    """Which states stay."""

    stays: Tensor  #: ``[N]``, bool
    log_gate: Tensor  #: ``[N]``, of staying; 0, but for its gradient, with straight-through
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
        check_channels(token_channels=token_channels, state_channels=state_channels)
        check_choice("gate", gate, GATES)
        check_choice("prune", prune, (True, False))
        is_integer = isinstance(address_channels, int) and not isinstance(address_channels, bool)
        if not is_integer or not 0 < address_channels < state_channels:
            raise ValueError(
                f"address_channels must be an integer that leaves channels for what a state holds, "
                f"1..{state_channels - 1}, but is {address_channels!r}"
            )
        _check_number("match_scale", match_scale, above=0.0)
        _check_number("novelty", novelty)
        if budget is not None:
            _check_number("budget", budget, least=1.0)
        self.token_channels, self.state_channels = token_channels, state_channels
        self.address_channels = address_channels
        self.gate, self.budget, self._prunes = gate, budget, prune
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

    @property
    def prune(self) -> bool:
        """Whether states can leave."""
        return self._prunes

    @prune.setter
    def prune(self, prunes: bool) -> None:
        if prunes and self.lin_keep is None:
            raise ValueError(
                "the allocator was built with prune=False and has nothing to decide by; build it "
                "with prune=True"
            )
        self._prunes = bool(prunes)

    def _pass(self, logit: Tensor) -> Tensor:
        """The log of a decision's gate: 0 with straight-through, else its log probability."""
        log_probability = F.logsigmoid(logit)
        if self.gate == "continuous":
            return log_probability
        return log_probability - log_probability.detach()

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
        nothing = explained.new_zeros(0)
        if tokens.num_rows == 0:
            return Founding(nothing.bool(), nothing, nothing)
        # Low enough for nobody, and finite, so that gradients are.
        lowest = torch.finfo(explained.dtype).min / 4
        address_BSA = tokens.pad(address)
        explained_BS = tokens.pad(explained).clamp(min=lowest)
        is_token_BS = tokens.mask()
        match_BSS = self.log_scale.exp() * (address_BSA @ address_BSA.mT)
        noise_BS = torch.zeros_like(explained_BS)
        if self.training:
            noise_BS = torch.rand_like(explained_BS).clamp(1e-6, 1 - 1e-6).logit()

        # What founders of this segment explain of the tokens behind them.
        fresh_BS = torch.full_like(explained_BS, lowest)
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in range(tokens.max_count):
            known = torch.logaddexp(explained_BS[:, i], fresh_BS[:, i])
            logit = self.novelty - self.restraint - known
            founds = (logit + noise_BS[:, i] > 0) & is_token_BS[:, i] & (room > 0)
            log_gate = self._pass(logit)
            room = room - founds.long()
            columns.append((founds, log_gate, logit))
            if bool(founds.any()):
                more = torch.logaddexp(fresh_BS, match_BSS[:, i] + log_gate.unsqueeze(1))
                fresh_BS = torch.where(founds.unsqueeze(1), more, fresh_BS)
        return Founding(
            *(tokens.unpad(torch.stack(rows, 1)) for rows in zip(*columns, strict=True))
        )

    def explained(self, match: Tensor, log_presence: Tensor, relation: Relation) -> Tensor:
        r""":math:`\log \sum_j p_j e^{m_{ij}}` over the states of each token's example, ``[T]``."""
        src, dst = relation.edge_index
        score = match + log_presence[dst]
        top = torch.full((relation.num_src,), -torch.inf, dtype=score.dtype, device=score.device)
        top = top.scatter_reduce(0, src, score.detach(), "amax")
        total = group_sum((score - top[src]).exp(), src, relation.num_src)
        # A token without states, of which the total is 0, is explained by nobody.
        return total.clamp(min=torch.finfo(total.dtype).tiny).log() + top

    # Who stays ##################################################################

    def stay(self, states: Tensor, nodes: Partition, min_states: int) -> Staying | None:
        """Which states stay in the node sets of their examples; None where all do.

        The best ``min_states`` of every example always do.
        """
        if self.lin_keep is None or not self.prune:
            return None
        logit = self.lin_keep(states).squeeze(-1)
        tried = logit.detach()
        if self.training:
            # A little noise: what is near the border tries both sides.
            tried = tried + 0.25 * torch.rand_like(tried).clamp(1e-6, 1 - 1e-6).logit()
        order = torch.argsort(tried, descending=True, stable=True)
        order = order[torch.argsort(nodes.batch[order], stable=True)]
        is_best = torch.empty_like(order, dtype=torch.bool)
        is_best[order] = nodes.place < min_states
        return Staying((tried > 0) | is_best, self._pass(logit), logit.detach())

    # What it may cost ###########################################################

    @torch.no_grad()
    def restrain(self, num_states: float, rate: float = 0.05) -> None:
        """Moves the threshold of founding by how far an average number of states is over budget.

        It stays where it can be undone: twice the scale is more than any token exceeds.
        """
        if self.budget is not None:
            over = (num_states - self.budget) / self.budget
            most = 2 * float(self.log_scale.exp())
            self.restraint.add_(rate * over).clamp_(min=0, max=most)

    def extra_repr(self) -> str:
        budget = "" if self.budget is None else f", budget={self.budget}"
        return (
            f"{self.token_channels}, {self.state_channels}, "
            f"address_channels={self.address_channels}, gate={self.gate!r}{budget}"
        )


def _check_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= above or value < least:
        bound = f" above {above:g}" if above > -math.inf else ""
        bound = f" of at least {least:g}" if least > -math.inf else bound
        raise ValueError(f"{name} must be a finite number{bound}, but is {value!r}")
