"""The loop over segments as one operation: the documented cell, from the first step to the last.

The cell's equations with dense attention, for a ragged batch whose groups (segments of examples)
stand step by step. `reference.py` is the loop in plain torch, `cpu/` one kernel for all of it,
`triton/` one for GPUs, `README.md` the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.hoist import HoistWeights, TokenGroups, check_tokens
from nsm_graph.ops.segment_loop import reference
from nsm_graph.ops.segment_loop.inputs import LoopSegments as LoopSegments
from nsm_graph.ops.segment_loop.inputs import LoopWeights as LoopWeights
from nsm_graph.ops.segment_loop.inputs import TokenResults as TokenResults
from nsm_graph.ops.segment_loop.limits import why_not_triton as why_not_triton
from nsm_graph.ops.segment_loop.scan import LoopScan as LoopScan
from nsm_graph.ops.segment_loop.scan import check_scan

BACKENDS = ("cpu", "triton", "reference")


def segment_loop(
    states: Tensor,
    routed: Tensor,
    key: Tensor,
    value: Tensor,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    *,
    talk_heads: int | None = None,
    cell: Tensor | None = None,
    keep: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""Reads all segments of all examples into their states.

    .. math::
        u &= r_t + W_o\,\mathrm{attend}(W_q s, K_t, V_t) + b_o \\
        (\rho, z) &= \sigma(W_g [s, u] + b_g), \quad
        c = \tanh(W_c [\rho s, u] + b_c), \quad s \leftarrow (1 - z) s + z c \\
        s &\leftarrow \mathrm{LayerNorm}(s + W_m\,\mathrm{attend}(s, s, s) + b_m)
        \quad \text{(optional)}

    With a cell, gates and states are an LSTM's instead of a GRU's:

    .. math::
        (i, f, o) = \sigma(W_g [s, u] + b_g), \quad g = \tanh(W_g [s, u] + b_g), \quad
        c \leftarrow f c + i g, \quad s \leftarrow o \tanh c

    Where the gates' weights are made for fewer channels than states have, G of C, the first
    K = C - G channels of a state, k, are *kept*: attention's query reads all channels, gates and
    candidate read k beside the others, and no step writes them. Above, s is then (k, s) in the
    query, s elsewhere, and the input of the gates is followed by k:

    .. math::
        u = r_t + W_o\,\mathrm{attend}(W_q [k, s], K_t, V_t) + b_o, \quad
        (\rho, z) = \sigma(W_g [s, u, k] + b_g), \quad
        c = \tanh(W_c [\rho s, u, k] + b_c)

    Args:
        states: The states before the first step.
        routed: Routed sums after their projection, r, group by group.
        key: Keys of all tokens, group by group.
        value: Their values; may be the very tensor ``key``.
        segments: The steps.
        weights: The cell's.
        heads: H, of attention.
        talk_heads: Heads of communication; ``None`` for as many. (default: :obj:`None`)
        cell: The LSTM's cell before the first step; ``None`` for a GRU. (default: :obj:`None`)
        keep: Keep what every step makes for backward; otherwise backward makes it again, step by
            step: a fraction of the memory, a little more time. (default: :obj:`True`)
        backend: ``"cpu"``, ``"triton"`` for a GPU, ``"reference"``, or ``None`` for the kernel
            where tensors are in float32 on a CPU, or on a GPU whose kernel knows all of this.
            (default: :obj:`None`)

    Shapes:
        - **input:** for S groups, states :math:`(BN, C)`, cell :math:`(BN, G)`, routed
          :math:`(SN, C)`, key and value :math:`(T, C)`
        - **output:** states after every step, :math:`(SN, C)`, in the order of ``routed``, and
          after the last step of each example, :math:`(BN, C)`; of an LSTM also the cell after
          that, :math:`(BN, G)`

    Raises:
        ValueError: If shapes or types disagree, or the backend does not know what it is given.
    """
    _check_backend(backend, states)
    talk_heads = heads if talk_heads is None else talk_heads
    _check(states, routed, key, value, segments, weights, heads, talk_heads, cell)
    why_not = None
    if backend in ("triton", None) and _on_gpu(states):
        num_states = routed.size(0) // max(segments.token_ptr.numel() - 1, 1)
        why_not = why_not_triton(
            states.dtype, num_states, states.size(1), weights.gated, is_lstm=cell is not None
        )
        if why_not is not None and backend == "triton":
            raise ValueError(f"{why_not}; ask for backend='reference'")
    backend = _choose(backend, states, why_not)
    if backend == "reference" or routed.numel() == 0:
        return reference.segment_loop(
            states, routed, key, value, segments, weights, heads, talk_heads, cell
        )
    if backend == "triton":
        from nsm_graph.ops.segment_loop import gpu

        return gpu.segment_loop(states, routed, key, value, segments, weights, heads, talk_heads)
    from nsm_graph.ops.segment_loop import fused

    return fused.segment_loop(
        states, routed, key, value, segments, weights, heads, talk_heads, keep, cell
    )


def token_loop(
    states: Tensor,
    x: Tensor,
    first: Tensor,
    projections: HoistWeights,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    *,
    scan: LoopScan | None = None,
    talk_heads: int | None = None,
    cell: Tensor | None = None,
    keep: bool = True,
    backend: str | None = None,
) -> TokenResults:
    r"""The same from tokens: :func:`nsm_graph.ops.hoist`, whose results never leave the cache.

    With a scan the tokens of a segment first act on the states one after another
    (:func:`nsm_graph.ops.delta_scan.delta_scan`), and the step reads the states that this leaves.

    Args:
        states: The states before the first step.
        x: The tokens, those of a group one after another.
        first: For each group, its first token in ``x``.
        projections: What makes keys, values and routed sums of tokens.
        segments: The steps.
        weights: The cell's.
        heads: H, of router and attention.
        scan: An ordered scan of one layer. (default: :obj:`None`)
        talk_heads: Heads of communication; ``None`` for as many. (default: :obj:`None`)
        cell: See :func:`segment_loop`.
        keep: The same.
        backend: ``"cpu"``, ``"reference"``, or ``None`` for the kernel where tensors are in
            float32 on a CPU. (default: :obj:`None`)

    Shapes:
        - **input:** for S groups, states :math:`(BN, C)`, x :math:`(T, C_t)`, first :math:`(S,)`
        - **output:** states after every step :math:`(SN, C)` and after the last of each example
          :math:`(BN, C)`; how much routing weight each state received of each group,
          :math:`(SN,)`, constants to autograd; the last cell of an LSTM, :math:`(BN, G)`; what
          tokens read from a scan with T + M heads of D channels, group by group,
          :math:`(T, (T + M) D)`. See :class:`TokenResults`

    Raises:
        ValueError: If shapes or types disagree, or the backend does not know what it is given.
    """
    if backend == "triton":
        raise ValueError(
            "the kernel for a GPU reads rows, not tokens: give what nsm_graph.ops.hoist makes of "
            "them to segment_loop"
        )
    _check_backend(backend, states)
    backend = _choose(backend, states, "rows are not given")
    groups = TokenGroups(first, segments.token_ptr)
    check_tokens(x, groups, projections, heads)
    num_states = projections.logits.size(0) // heads
    rows = x.new_empty(1, 1).expand(first.numel() * num_states, states.size(-1))
    tokens = x.new_empty(1, 1).expand(int(segments.token_ptr[-1]), projections.key.size(0))
    talk_heads = heads if talk_heads is None else talk_heads
    _check(states, rows, tokens, tokens, segments, weights, heads, talk_heads, cell)
    if scan is not None:
        check_scan(scan, x, states.size(0) // num_states, num_states, states.size(-1))
    if backend == "reference" or first.numel() == 0:
        return reference.token_loop(
            states, x, first, projections, segments, weights, heads, talk_heads, cell, scan
        )
    from nsm_graph.ops.segment_loop import fused

    return fused.token_loop(
        states, x, first, projections, segments, weights, heads, talk_heads, keep, cell, scan
    )


def _check_backend(backend: str | None, states: Tensor) -> None:
    """Raises unless a backend of that name can serve these states."""
    if backend not in (*BACKENDS, None):
        raise ValueError(f"backend must be one of {BACKENDS} or None, but is {backend!r}")
    is_known = states.is_cpu and states.dtype in (torch.float32, torch.float64)
    if backend == "cpu" and not is_known:
        raise ValueError(
            f"the kernel takes torch.float32 and torch.float64 on cpu, but states are "
            f"{states.dtype} on {states.device}; ask for backend='reference'"
        )
    if backend == "triton" and not _on_gpu(states):
        raise ValueError(
            f"backend='triton' needs states on a GPU, but they are on {states.device}; ask for "
            f"backend='cpu' or 'reference'"
        )


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _choose(backend: str | None, states: Tensor, why_not: str | None) -> str:
    """The backend for these states; ``why_not`` is said of a GPU's kernel."""
    if backend is not None:
        return backend
    if _on_gpu(states):
        is_served = why_not is None and states.dtype != torch.float64
        return "triton" if is_served else "reference"
    return "cpu" if states.is_cpu and states.dtype == torch.float32 else "reference"


def release_memory() -> None:
    """Gives back the memory of the last training step, which is held for the next of its size."""
    from nsm_graph.ops.segment_loop import fused

    fused.release_memory()


def _check(
    states: Tensor,
    routed: Tensor,
    key: Tensor,
    value: Tensor,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    talk_heads: int,
    cell: Tensor | None,
) -> None:
    """Raises unless everything fits."""
    channels = states.size(-1)
    num_groups = segments.token_ptr.numel() - 1
    for name, rows in (("states", states), ("routed", routed), ("key", key), ("value", value)):
        if rows.dim() != 2 or rows.size(1) != channels:
            raise ValueError(
                f"{name} must have shape (rows, {channels}), but has {tuple(rows.shape)}"
            )
        if rows.dtype != states.dtype or rows.device != states.device:
            raise ValueError(
                f"{name} is {rows.dtype} on {rows.device}, but states are {states.dtype} on "
                f"{states.device}"
            )
    gated = _check_gates(weights, channels, cell)
    cell_size = (states.size(0), gated)
    if cell is not None and (cell.shape, cell.dtype, cell.device) != (
        cell_size, states.dtype, states.device,
    ):  # fmt: skip
        raise ValueError(
            f"cell must be like states, {cell_size} in {states.dtype} on {states.device}, where "
            f"weights.gates write {gated} channels, but is {tuple(cell.shape)} in {cell.dtype} on "
            f"{cell.device}"
        )
    if heads < 1 or channels % heads != 0:
        raise ValueError(f"heads={heads} must divide the {channels} channels of states")
    if weights.qkv is not None and (talk_heads < 1 or gated % talk_heads != 0):
        raise ValueError(
            f"talk_heads={talk_heads} (heads, unless given) must divide the {gated} channels that "
            f"weights.gates write"
        )
    if int(segments.num_active.sum()) != num_groups:
        raise ValueError(
            f"num_active adds up to {int(segments.num_active.sum())} groups, but token_ptr has "
            f"{num_groups}"
        )
    if int(segments.token_ptr[0]) != 0:
        raise ValueError(f"token_ptr must begin at 0, but begins at {int(segments.token_ptr[0])}")
    if key.size(0) != value.size(0) or int(segments.token_ptr[-1]) != key.size(0):
        raise ValueError(
            f"token_ptr ends at {int(segments.token_ptr[-1])}, but key and value have "
            f"{key.size(0)} and {value.size(0)} rows"
        )
    if num_groups == 0:
        return
    num_examples = int(segments.num_active[0])
    num_states = routed.size(0) // num_groups
    if num_states * num_groups != routed.size(0) or states.size(0) < num_states * num_examples:
        raise ValueError(
            f"routed has {routed.size(0)} rows for {num_groups} groups and states have "
            f"{states.size(0)} for at least {num_examples} examples: every example needs the same "
            f"number of states"
        )
    if bool((segments.num_active.diff() > 0).any()):
        raise ValueError("num_active must not grow: examples stand longest first")
    if bool((segments.token_ptr.diff() < 1).any()):
        raise ValueError("every group needs at least one token")
    num_gates = 2 if cell is None else 4
    sizes = {
        "query": (channels, channels), "query_bias": (channels,), "out": (channels, channels),
        "out_bias": (channels,), "gates": (num_gates * gated, 2 * channels),
        "gates_bias": (num_gates * gated,), "candidate": (gated, 2 * channels),
        "candidate_bias": (gated,), "qkv": (3 * gated, gated), "qkv_bias": (3 * gated,),
        "mix": (gated, gated), "mix_bias": (gated,), "scale": (gated,), "shift": (gated,),
    }  # fmt: skip
    where = "" if gated == channels else (
        f", where weights.gates write {gated} of {channels} channels"
    )  # fmt: skip
    optional: set[str] = set()
    if cell is not None:
        optional.update(LoopWeights._fields[6:8])
        if weights.candidate is not None or weights.candidate_bias is not None:
            raise ValueError("an LSTM, which has a cell, has no weights.candidate of its own")
    if all(tensor is None for tensor in weights[8:]):
        optional.update(LoopWeights._fields[8:])
    for (name, size), tensor in zip(sizes.items(), weights, strict=True):
        if tensor is None:
            if name not in optional:
                raise ValueError(f"weights.{name} is missing")
        elif (tensor.shape, tensor.dtype, tensor.device) != (size, states.dtype, states.device):
            raise ValueError(
                f"weights.{name} must have shape {size} in {states.dtype} on {states.device}"
                f"{where}, but has {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )


def _check_gates(weights: LoopWeights, channels: int, cell: Tensor | None) -> int:
    """How many channels the gates write; raises where their rows cannot be for so many."""
    gates, num_gates = weights.gates, 2 if cell is None else 4
    if gates is None:
        raise ValueError("weights.gates is missing")
    gated, rest = divmod(gates.size(0), num_gates) if gates.dim() == 2 else (0, 0)
    if rest > 0 or not 1 <= gated <= channels:
        raise ValueError(
            f"weights.gates must have shape {(num_gates * channels, 2 * channels)} in "
            f"{gates.dtype} on {gates.device}, or {num_gates} rows for each channel that it is to "
            f"write, but has {tuple(gates.shape)} in {gates.dtype} on {gates.device}"
        )
    return gated
