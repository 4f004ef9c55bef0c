"""What a query returns becomes edges, or an error that shows the rows that are wrong.

Legend: E rows of the result, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from nsm_graph.relation import Relation
from nsm_graph.topology.node_set import NodeSet
from nsm_graph.topology.rows import rows_from_keys

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

_INTEGERS = {
    *("tinyint", "smallint", "integer", "bigint", "hugeint"),
    *("utinyint", "usmallint", "uinteger", "ubigint", "uhugeint"),
    "null",
}
_NUMBERS = _INTEGERS | {"float", "double", "decimal"}
_SEVERAL = {"list", "array"}


def check_columns(rule: object, result: DuckDBPyRelation) -> None:
    """Raises unless a query returns edges, and maybe a bias, of types that can be meant."""
    names = [name.lower() for name in result.columns]
    if sorted(names) not in (["dst", "src"], ["bias", "dst", "src"]):
        raise ValueError(
            f"{rule!r} must return the columns src and dst, and bias where edges carry one, but "
            f"returns {', '.join(result.columns)}; name them with AS"
        )
    kinds = dict(zip(names, result.types, strict=True))
    for end in ("src", "dst"):
        if kinds[end].id not in _INTEGERS:
            raise ValueError(
                f"{rule!r} must return ids of nodes, which are integers, but {end} is "
                f"{kinds[end]}; return the column id"
            )
    if "bias" in kinds and kinds["bias"].id not in _NUMBERS | _SEVERAL:
        raise ValueError(
            f"{rule!r} must return a number as bias, or one for each head in an array or a list, "
            f"but bias is {kinds['bias']}"
        )


def relation_of(rule: object, result: DuckDBPyRelation, sets: Sequence[NodeSet]) -> Relation:
    """The relation of the edges that a query returns, by target, then by source."""
    columns = _fetch(result)
    sources, targets = sets[0], sets[-1]
    size = (sources.num_nodes, targets.num_nodes)
    rows = _Rows(rule, columns)
    rows.check_null()
    src, dst = (np.asarray(columns[end]) for end in ("src", "dst"))
    first = size[0] if len(sets) == 2 else 0  # id of the first target
    rows.check_ids(src, dst, first, size, len(sets) == 2)
    dst = dst - first
    example = [nodes.batch.cpu().numpy() for nodes in (sources, targets)]
    rows.check_examples(example[0][src], example[1][dst])
    keys = dst * size[0] + src
    order = np.argsort(keys, kind="stable")
    rows.check_once(keys, order)
    device = sources.ptr.device
    index = rows_from_keys(torch.from_numpy(keys[order]).to(device), size)
    relation = Relation.from_rows(*index, size, sources.nodes, targets.nodes)
    heads = [columns[name] for name in columns if name.startswith("bias")]
    if not heads:
        return relation
    bias = np.stack([np.asarray(head)[order] for head in heads], axis=1)
    return relation.with_bias(torch.from_numpy(bias).to(device))


def _fetch(result: DuckDBPyRelation) -> dict[str, np.ndarray]:
    """``src``, ``dst`` and, for each head, ``bias1``, ...; with ``width``, where it may vary."""
    wanted = ["CAST(src AS BIGINT) AS src", "CAST(dst AS BIGINT) AS dst"]
    kinds = {name.lower(): kind.id for name, kind in zip(result.columns, result.types, strict=True)}
    if "bias" in kinds and kinds["bias"] not in _SEVERAL:
        wanted.append("CAST(bias AS DOUBLE) AS bias1")
    elif "bias" in kinds:
        width = "len(CAST(bias AS DOUBLE[]))"
        widest = result.aggregate(f"max({width})").fetchall()[0][0] or 1
        wanted.append(f"{width} AS width")
        wanted += [f"CAST(bias AS DOUBLE[])[{h}] AS bias{h}" for h in range(1, widest + 1)]
    return result.project(", ".join(wanted)).fetchnumpy()


class _Rows:
    """The rows of a result, for errors that show them."""

    def __init__(self, rule: object, columns: dict[str, np.ndarray]) -> None:
        self.rule, self.columns = rule, columns

    def check_null(self) -> None:
        is_null = np.zeros(len(self.columns["src"]), dtype=bool)
        width = self.columns.get("width")
        if width is not None:
            is_short = np.ma.filled(width != width.max(), False) if len(width) > 0 else is_null
            self._refuse(is_short, "must return as many biases for every edge (one for each head)")
        for name in self.columns:
            is_null |= np.ma.getmaskarray(self.columns[name])
        self._refuse(is_null, "must not return NULL", "exclude such rows with IS NOT NULL")
        for name, values in self.columns.items():
            if name.startswith("bias"):
                is_wrong = np.isnan(values) | (values == np.inf)
                self._refuse(is_wrong, "must return a bias that is a number, or -inf for no edge")

    def check_ids(
        self, src: np.ndarray, dst: np.ndarray, first: int, size: tuple[int, int], is_two: bool
    ) -> None:
        is_wrong = (src < 0) | (src >= size[0]) | (dst < first) | (dst >= first + size[1])
        ids = f"ids of the {size[0]} nodes, 0..{size[0] - 1}"
        if is_two:
            ids = (
                f"ids of the {size[0]} sources, 0..{size[0] - 1}, as src and of the {size[1]} "
                f"targets, {first}..{first + size[1] - 1}, as dst"
            )
        self._refuse(is_wrong, f"must return {ids}", "return the column id")

    def check_examples(self, of_source: np.ndarray, of_target: np.ndarray) -> None:
        self._refuse(
            of_source != of_target,
            "must stay inside each example",
            "join on k.example = q.example",
        )

    def check_once(self, keys: np.ndarray, order: np.ndarray) -> None:
        is_repeated = np.zeros(len(keys), dtype=bool)
        is_repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
        self._refuse(is_repeated, "must return every edge once", "use SELECT DISTINCT")

    def _refuse(self, is_wrong: np.ndarray, rule: str, hint: str = "") -> None:
        wrong = np.flatnonzero(is_wrong)
        if len(wrong) == 0:
            return
        # Always the same ones, whatever the order of the rows.
        ends = [np.ma.filled(self.columns[end][wrong], -1) for end in ("src", "dst")]
        shown = [self._show(row) for row in wrong[np.lexsort(ends)[:3]]]
        more = f" and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
        raise ValueError(
            f"{self.rule!r} {rule}, but {len(wrong)} of its {len(is_wrong)} rows do not: "
            f"{', '.join(shown)}{more}{'; ' if hint else ''}{hint}"
        )

    def _show(self, row: int) -> str:
        values = {name: values[row] for name, values in self.columns.items() if name != "width"}
        said = {name: "NULL" if v is np.ma.masked else str(v) for name, v in values.items()}
        bias = [said[name] for name in said if name.startswith("bias")]
        return f"({said['src']} -> {said['dst']}{', bias ' if bias else ''}{', '.join(bias)})"
