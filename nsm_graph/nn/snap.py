"""Snapping: states are drawn to the nearest of a few codes at segment boundaries (X8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm_graph.ops.segment import widen


class Snapped(NamedTuple):
    """What snapping gives."""

    states: Tensor  #: ``[B, N, C]``, the chosen codes
    code: Tensor  #: ``[B]``, which code each example was drawn to
    margin: Tensor  #: ``[B]``, 1 = on the code, 0 = halfway between two: it could be either


class StateSnap(nn.Module):
    r"""Replaces all states of an example by the nearest code of a codebook.

    .. math::
        k_b = \arg\min_k \lVert s_b - c_k \rVert, \qquad s_b \leftarrow c_{k_b}, \qquad
        \text{margin}_b = 1 - d_1 / d_2

    Small errors of a segment then end with it instead of adding up along the stream. A code covers
    the states of one example together; ``d_1`` and ``d_2`` are the distances to the nearest and the
    second nearest. Ties go to the lowest code. Gradients pass straight through to the states, and
    in training the codes follow the states that are drawn to them (a moving average).

    Source: ours (X8). :meth:`from_labels` derives a codebook without labels of the task: the
    groups can be what a trained machine itself predicts.

    Args:
        codes: The codebook, one row of every slot for each code.
        decay: Of the moving average; 1 leaves the codes as they are. (default: :obj:`0.99`)

    Shapes:
        - **codes:** :math:`(M, K, C)` for M slots and K codes
        - **input:** states :math:`(B, N, C)`, slots :math:`(N,)`
        - **output:** :class:`Snapped`

    Raises:
        ValueError: If the codebook is empty or not finite, or shapes disagree.

    Example:
        >>> snap = StateSnap(torch.tensor([[[0.0], [1.0]]]))       # one slot, two codes
        >>> snapped = snap(torch.tensor([[[0.9]], [[0.5]]]))
        >>> snapped.states.flatten().tolist(), snapped.margin[1].item()
        ([1.0, 0.0], 0.0)
    """

    slot_dims = {"codes": 0}
    codes: Tensor

    def __init__(self, codes: Tensor, *, decay: float = 0.99) -> None:
        super().__init__()
        if codes.dim() != 3 or codes.numel() == 0:
            raise ValueError(
                f"codes must have shape (slots, codes, channels), all positive, but has "
                f"{tuple(codes.shape)}"
            )
        if not bool(codes.isfinite().all()):
            raise ValueError("codes hold NaN or infinity; derive them from finite states")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], but is {decay}")
        self.num_states, self.num_codes, self.channels = codes.shape
        self.decay = decay
        self.register_buffer("codes", codes.detach().clone())

    @classmethod
    def from_labels(cls, states: Tensor, labels: Tensor, *, decay: float = 0.99) -> StateSnap:
        """The mean of the states of each label; labels that do not occur get no code.

        Args:
            states: ``[B, M, C]``, all slots of B examples.
            labels: ``[B]``, any integers.
        """
        if states.dim() != 3 or labels.shape != states.shape[:1]:
            raise ValueError(
                f"expected states (B, M, C) and one label for each example, but got "
                f"{tuple(states.shape)} and {tuple(labels.shape)}"
            )
        _, group = labels.unique(return_inverse=True)
        count = torch.bincount(group)
        # Sums of many states: in double, so that codes are as exact as one state.
        total = states.double().new_zeros(count.numel(), *states.shape[1:])
        mean = total.index_add(0, group, states.double()) / count.view(-1, 1, 1)
        return cls(mean.to(states.dtype).transpose(0, 1), decay=decay)

    def reset_slots(self, slots: Tensor) -> None:
        """A fresh slot knows nothing: all its codes are zero, and no distance comes from it."""
        with torch.no_grad():
            self.codes[slots] = 0.0

    def forward(self, states: Tensor, slots: Tensor | None = None) -> Snapped:
        """Runs the forward pass of the module."""
        codes_KNC = (self.codes if slots is None else self.codes[slots]).transpose(0, 1)
        if states.dim() != 3 or states.shape[1:] != codes_KNC.shape[1:]:
            raise ValueError(
                f"states must have shape (examples, {codes_KNC.size(1)}, {self.channels}), but has "
                f"{tuple(states.shape)}"
            )
        if states.size(0) == 0:
            none = torch.zeros(0, dtype=torch.long, device=states.device)
            return Snapped(states, none, states.new_zeros(0))
        with torch.no_grad():
            code, margin = self._nearest(widen(states).flatten(1), widen(codes_KNC).flatten(1))
        chosen = codes_KNC[code].to(states.dtype)
        # The codes to the last bit, with the gradient of the states; a NaN stays one.
        snapped = chosen + (states - states.detach())
        if self.training and self.decay < 1:
            self._follow(states.detach(), code, slots)
        return Snapped(snapped, code, margin)

    def _nearest(self, states_BX: Tensor, codes_KX: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest code of each example, and how clearly it is the nearest."""
        # Exact differences: the usual product form loses the digits that matter near a code.
        distance_BK = torch.cdist(
            states_BX, codes_KX.to(states_BX), compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest = distance_BK.min(dim=1)
        if self.num_codes == 1:
            return nearest.indices, torch.ones_like(nearest.values)
        others_BK = distance_BK.scatter(1, nearest.indices.unsqueeze(1), torch.inf)
        second = others_BK.amin(1)
        # On two codes at once: it could be either.
        margin = (1 - nearest.values / second).masked_fill(second == 0, 0.0)
        return nearest.indices, margin

    @torch.no_grad()
    def _follow(self, states: Tensor, code: Tensor, slots: Tensor | None) -> None:
        # One diverged example must not spoil a code for all that come later.
        is_finite = states.isfinite().flatten(1).all(1)
        states, code = states[is_finite], code[is_finite]
        count = torch.bincount(code, minlength=self.num_codes)
        total = states.new_zeros(self.num_codes, *states.shape[1:]).index_add(0, code, states)
        seen = count > 0
        mean_NKC = (total[seen] / count[seen].view(-1, 1, 1)).transpose(0, 1).to(self.codes.dtype)
        rows = torch.arange(self.num_states, device=code.device) if slots is None else slots
        index = (rows.unsqueeze(1), seen.nonzero().flatten())
        self.codes[index] = self.decay * self.codes[index] + (1 - self.decay) * mean_NKC

    def extra_repr(self) -> str:
        return f"num_states={self.num_states}, num_codes={self.num_codes}, channels={self.channels}"
