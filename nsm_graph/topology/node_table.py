"""The tables that a query sees: one row for each node, one column for whatever is known of it.

Legend: N nodes of one set, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsm_graph.topology.checks import show_rows
from nsm_graph.topology.node_set import NodeSet

#: Rows of two node sets, where nothing else says what they are: tokens are read by states.
KINDS_OF_TWO = ("token", "state")

TEXT = "'"  #: what stands around a text in SQL; around a name stands '"'


class NodeTable(NamedTuple):
    """One node set as columns, and how SQL makes the table of them."""

    arrays: dict[str, np.ndarray]  #: what is handed to the database, each ``[N]``
    columns: dict[str, str]  #: what the query sees: names, and how they are made of the arrays
    widths: dict[str, int]  #: channels of the columns that hold an array

    @property
    def select(self) -> str:
        return ", ".join(f"{made} AS {quoted(name)}" for name, made in self.columns.items())


def tables_of(
    rule: object, sets: Sequence[NodeSet], kinds: Sequence[str] | None, is_dynamic: bool
) -> list[NodeTable]:
    """The table of each node set; ids go on counting from set to set.

    Raises:
        ValueError: If an attribute has a name that is taken, or no rows that a table can hold.
    """
    names = KINDS_OF_TWO[-len(sets) :]
    has_slots = [nodes.slots is not None for nodes in sets]
    if has_slots == [True, False]:
        names = names[::-1]
    tables, first = [], 0
    for nodes, name in zip(sets, names, strict=True):
        tables.append(_table(rule, nodes, first, name, kinds, is_dynamic))
        first += nodes.num_nodes
    return tables


def fingerprint(sets: Sequence[NodeSet]) -> bytes:
    """Equal for node sets of which a query that reads no states sees the same."""
    digest = hashlib.blake2b()
    for nodes in sets:
        for name, values in _known(nodes):
            shape = None if values is None else (values.dtype, tuple(values.shape))
            digest.update(repr((name, shape)).encode())
            if values is not None:
                values = values.detach().cpu().contiguous().view(-1)
                digest.update(values.view(torch.uint8).numpy().data)
    return digest.digest()


def _known(nodes: NodeSet) -> Iterator[tuple[str, Tensor | None]]:
    yield "ptr", nodes.ptr
    yield "slots", nodes.slots
    yield from nodes.attributes.items()


def _table(
    rule: object,
    nodes: NodeSet,
    first: int,
    kind: str,
    kinds: Sequence[str] | None,
    is_dynamic: bool,
) -> NodeTable:
    position = nodes.position
    columns: dict[str, Tensor | str] = {
        "id": torch.arange(first, first + nodes.num_nodes),
        "example": nodes.batch,
        "kind": quoted(kind, TEXT),
        "slot": nodes.slots if nodes.slots is not None else position,
        "pos": position,
    }
    if kind == "token" and nodes.slots is None:
        columns["slot"] = "CAST(NULL AS BIGINT)"
    given = {"id": "ids", "example": "examples"}
    if is_dynamic:
        columns["step"] = f"CAST({nodes.step} AS BIGINT)"
        given |= {"step": "the step", "x": "the current states"}
        if nodes.x is not None:
            columns["x"] = nodes.x
    for name, values in nodes.attributes.items():
        if not name:
            raise ValueError(f"{rule!r}: an attribute is called '', which no column can be called")
        if name.lower() in given:
            raise ValueError(
                f"{rule!r}: an attribute is called {name!r}, but that column of the table holds "
                f"{given[name.lower()]}; give it another name"
            )
        given[name.lower()] = f"the attribute {name!r}"
        columns.pop(name.lower(), None)  # pos, slot and kind are the user's, where he gives them
        columns[name] = values
    table = NodeTable({}, {}, {})
    for name, column in columns.items():
        # NodeSet.from_counts sees to it; one that was built directly may hold anything.
        if isinstance(column, Tensor) and column.shape[:1] != (nodes.num_nodes,):
            raise ValueError(
                f"{rule!r}: {name!r} must have one row for each of the {nodes.num_nodes} nodes, "
                f"but has shape {tuple(column.shape)}"
            )
        table.columns[name] = _column(rule, table, name, column, kinds)
    return table


def _column(
    rule: object, table: NodeTable, name: str, values: Tensor | str, kinds: Sequence[str] | None
) -> str:
    """Adds what a column is made of to the table; returns how SQL makes it."""
    if isinstance(values, str):
        return values
    if values.dim() not in (1, 2) or values.is_complex() or values.shape[1:].numel() == 0:
        raise ValueError(
            f"{rule!r}: a table holds numbers, or at least one in an array, for each node, but "
            f"{name!r} has shape {tuple(values.shape)} and dtype {values.dtype}"
        )
    if values.dtype == torch.bfloat16:
        values = values.float()
    values = values.detach().cpu()
    if name.lower() == "kind" and kinds is not None:
        _check_kinds(rule, values, kinds)
    array = values.numpy()
    parts = [array] if array.ndim == 1 else list(array.T)
    raw = [f"c{len(table.arrays) + i}" for i in range(len(parts))]
    table.arrays.update(zip(raw, map(np.ascontiguousarray, parts), strict=True))
    if array.ndim == 2:
        table.widths[name] = len(parts)
        return f"array_value({', '.join(raw)})"
    if name.lower() == "kind" and kinds is not None:
        return (
            f"([{', '.join(quoted(kind, TEXT) for kind in kinds)}])[CAST({raw[0]} AS BIGINT) + 1]"
        )
    return raw[0]


def _check_kinds(rule: object, values: Tensor, kinds: Sequence[str]) -> None:
    if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"{rule!r} names the kinds {', '.join(kinds)}, hence needs one integer for each node, "
            f"but the attribute 'kind' has shape {tuple(values.shape)} and dtype {values.dtype}"
        )
    is_wrong = (values < 0) | (values >= len(kinds))
    if bool(is_wrong.any()):
        raise ValueError(
            f"{rule!r} names the kinds 0..{len(kinds) - 1}, but the attribute 'kind' has "
            f"{show_rows(values, is_wrong)}"
        )


def quoted(name: str, quote: str = '"') -> str:
    """A name, or a text, as SQL writes it."""
    return quote + name.replace(quote, 2 * quote) + quote
