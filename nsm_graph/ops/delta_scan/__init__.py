"""The delta scan: tokens correct a memory one after another; the ordered form of aggregation.

A memory is a matrix of P rows and Q columns. Where it holds values under keys (rows) this is the
delta rule; where each column is a state and nothing is asked for (``value=None``), a correction
with ``beta=2`` reflects every state, and a token is a product of Householder maps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.ops.delta_scan import chunked, reference
from nsm_graph.ops.delta_scan.steps import DeltaSteps as DeltaSteps

BACKENDS = ("reference", "chunked")
#: Most corrections that one triangular solve composes. Longer chunks lose digits in float32
#: (`docs/experiments.md`) and cost more: the solve grows with their square.
MAX_ROWS = 32
#: A chunk of this many corrections for each row of the memory costs about as much to compose as to
#: apply; small heads have shorter chunks.
ROWS_PER_CHANNEL = 2


class PreparedScan(NamedTuple):
    """Everything that depends on the steps only; examples stand first in every tensor.

    Either chunks that are composed, or the steps themselves for the token-by-token form.
    """

    maps: chunked.ChunkMaps | None = None
    reads: chunked.QueryReads | chunked.ColumnReads | None = None
    steps: DeltaSteps | None = None
    query: Tensor | None = None
    weight: Tensor | None = None
    num_tokens: int = 0


def delta_scan(
    memory: Tensor,
    steps: DeltaSteps,
    *,
    query: Tensor | None = None,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Applies the steps of all tokens in order, and reads the memory after each.

    .. math::
        Z &\leftarrow Z + \beta_{ir} k_{ir} (v_{ir} - k_{ir}^\top Z)^\top, \quad r = 1..R \\
        Z &\leftarrow \alpha_i Z + a_i b_i^\top \\
        y_i &= q_i^\top Z \quad\text{or}\quad Z w_i

    Args:
        memory: Z, one matrix for each example and head.
        steps: What each token does; see :class:`DeltaSteps`.
        query: q, to read rows. (default: :obj:`None`)
        weight: w, to read columns, shared by the heads; not both. (default: :obj:`None`)
        backend: ``"reference"`` (token by token), ``"chunked"`` (one triangular solve for each
            chunk) or ``None``: chunked unless the steps are gated. (default: :obj:`None`)

    Shapes:
        - **input:** memory :math:`(B, H, P, Q)`, steps of S tokens, query :math:`(B, S, H, P)`,
          weight :math:`(B, S, Q)`
        - **output:** memory :math:`(B, H, P, Q)`, reads :math:`(B, S, H, Q)` or
          :math:`(B, S, H, P)`

    Raises:
        ValueError: If shapes disagree, or gated steps are asked of the chunked form.

    Example:
        >>> key = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2)
        >>> steps = DeltaSteps(key, torch.full((1, 1, 1, 1), 2.0))     # reflect along the first row
        >>> memory, _ = delta_scan(torch.ones(1, 1, 2, 3), steps)
        >>> memory[0, 0].tolist()
        [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]
    """
    _check(memory, steps, query, weight)
    return run(memory, prepare(steps, query=query, weight=weight, backend=backend))


def prepare(
    steps: DeltaSteps,
    *,
    query: Tensor | None = None,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> PreparedScan:
    """The part of :func:`delta_scan` that a loop over segments can hoist."""
    if backend not in (*BACKENDS, None):
        raise ValueError(
            f"backend of delta_scan must be one of {BACKENDS} or None, but is {backend!r}"
        )
    if query is not None and weight is not None:
        raise ValueError("query reads rows and weight reads columns; pass one of them")
    if steps.gate_BSQ is not None and backend == "chunked":
        raise ValueError(
            "gated steps differ from column to column and do not compose into one map; use "
            'backend="reference" or None'
        )
    if backend == "reference" or steps.gate_BSQ is not None or steps.num_tokens == 0:
        return PreparedScan(steps=steps, query=query, weight=weight)
    # Autocast would compose in 16 bits, where reflections are none.
    with torch.autocast(steps.key_BSHRP.device.type, enabled=False):
        solved = chunked.solve(steps, _chunk_length(steps))
        reads: chunked.QueryReads | chunked.ColumnReads | None = None
        if query is not None:
            reads = chunked.prepare_query_reads(solved, query)
        elif weight is not None:
            reads = chunked.prepare_column_reads(solved, weight)
        maps = chunked.compose(solved)
    return PreparedScan(maps=maps, reads=reads, num_tokens=steps.num_tokens)


def _chunk_length(steps: DeltaSteps) -> int:
    """Tokens that one triangular solve composes."""
    num_corrections, num_rows = steps.key_BSHRP.shape[3:]
    return max(1, min(MAX_ROWS, max(8, ROWS_PER_CHANNEL * num_rows)) // num_corrections)


def run(memory: Tensor, prepared: PreparedScan) -> tuple[Tensor, Tensor | None]:
    """The rest of :func:`delta_scan`."""
    with torch.autocast(memory.device.type, enabled=False):
        if prepared.steps is not None:
            return reference.delta_scan(memory, prepared.steps, prepared.query, prepared.weight)
        assert prepared.maps is not None
        memories = chunked.advance(memory, prepared.maps)
        if prepared.reads is None:
            return memories[-1], None
        return memories[-1], chunked.read(memories, prepared.reads)[:, : prepared.num_tokens]


def _check(memory: Tensor, steps: DeltaSteps, query: Tensor | None, weight: Tensor | None) -> None:
    if memory.dim() != 4 or steps.key_BSHRP.dim() != 5:
        raise ValueError(
            f"expected memory (B, H, P, Q) and keys (B, S, H, R, P), but got "
            f"{tuple(memory.shape)} and {tuple(steps.key_BSHRP.shape)}"
        )
    num_examples, num_heads, num_rows, num_columns = memory.shape
    num_tokens, num_corrections = steps.num_tokens, steps.key_BSHRP.size(3)
    if num_corrections < 1:
        raise ValueError("a token needs at least one correction, but keys have none")
    token = (num_examples, num_tokens)
    expected = {
        "key": (*token, num_heads, num_corrections, num_rows),
        "beta": (*token, num_heads, num_corrections),
        "value": (*token, num_heads, num_corrections, num_columns),
        "decay": (*token, num_heads),
        "row": (*token, num_heads, num_rows),
        "column": (*token, num_columns),
        "gate": (*token, num_columns),
        "query": (*token, num_heads, num_rows),
        "weight": (*token, num_columns),
    }
    given = {name.partition("_")[0]: tensor for name, tensor in steps._asdict().items()}
    given |= {"query": query, "weight": weight}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{name} must have shape {expected[name]} for a memory of {tuple(memory.shape)}, "
                f"but has {tuple(tensor.shape)}"
            )
        if tensor.dtype != memory.dtype or tensor.device != memory.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but memory is {memory.dtype} on "
                f"{memory.device}; move one with .to(...)"
            )
    if (steps.row_BSHP is None) != (steps.column_BSQ is None):
        raise ValueError("a write is row times column; pass both or none")
