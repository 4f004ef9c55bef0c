"""A rule written in SQL, over a table of the nodes. Needs DuckDB, which only this file imports."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from nsm_graph.relation import Relation
from nsm_graph.topology.base import Topology, check_examples
from nsm_graph.topology.node_set import NodeSet
from nsm_graph.topology.node_table import NodeTable, fingerprint, quoted, tables_of
from nsm_graph.topology.query_edges import check_columns, relation_of
from nsm_graph.topology.rows import Memo

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

#: Words that SQL takes for a call although they have no parentheses.
_CLOCKS = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
#: What DuckDB wrongly says to be the same every time.
_CLOCK_FUNCTIONS = {"current_localtime", "current_localtimestamp"}
#: Functions that run a statement, or read a table, which a text names.
_READERS = {"query", "query_table"}


def sql(query: str, *, is_dynamic: bool = False, kinds: Sequence[str] | None = None) -> SQL:
    r"""The edges that a query names; see :class:`SQL`.

    Example:
        >>> window = sql('''
        ...     SELECT k.id AS src, q.id AS dst
        ...     FROM nodes q JOIN nodes k
        ...     ON k.example = q.example AND k.pos BETWEEN q.pos - 1 AND q.pos
        ... ''')
        >>> window(NodeSet.from_counts([3, 2])).edge_index
        tensor([[0, 0, 1, 1, 2, 3, 3, 4],
                [0, 1, 1, 2, 2, 3, 4, 4]])
    """
    return SQL(query, is_dynamic, kinds)


class SQL(Topology):
    r"""A rule that is one SELECT, in DuckDB's SQL, over a table of the nodes.

    The table ``nodes`` has a row for each node of the batch, with the columns

    - ``id``: what the query returns; 0, 1, ... over the batch,
    - ``example``: which example of the batch it belongs to,
    - ``kind``: ``'state'``,
    - ``slot``: of the state (its place, where nobody says),
    - ``pos``: its place in the example,
    - every attribute of the node set by its name, in place of ``kind``, ``slot`` or ``pos`` if it
      has that name; one of several channels is an array, ``f[1], ..., f[C]``.

    Of two node sets, ``rule(sources, targets)``, the table holds both: ids of the targets go on
    counting after those of the sources, ``kind`` is ``'token'`` for sources and ``'state'`` for
    targets (the other way round where only the sources have slots), and ``slot`` of a token is
    NULL. The tables ``sources`` and ``targets`` hold one side each; of one node set, all three are
    the same. As in numpy's way to SQL, NaN is NULL.

    The query returns the columns ``src`` and ``dst`` and, where edges carry a bias, ``bias``: a
    number or, one for each head, an array or list of numbers. Edges stand by target, then by
    source, in whatever order the query returns them. The choice of edges carries no gradient.

    A query runs once for each node set that looks different to it, and is remembered. It can read
    no files and change nothing, and no function in it may depend on chance or on the time.

    Args:
        query: The statement.
        is_dynamic: Whether it reads the current states or the step, and is asked at every step:
            the tables then have ``x``, an array, and ``step``. (default: :obj:`False`)
        kinds: Names of the values 0, 1, ... of an attribute ``kind``. (default: :obj:`None`)

    Raises:
        ValueError: If the query is no text; when asked, if it is not one SELECT, DuckDB cannot run
            it, or it returns other columns, NULLs, ids of no node, edges that leave their example,
            or an edge twice.
        ImportError: When asked, if DuckDB is missing.
    """

    def __init__(
        self, query: str, is_dynamic: bool = False, kinds: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"sql takes a SELECT statement as text, but got {query!r}")
        if isinstance(kinds, str) or not all(isinstance(kind, str) for kind in kinds or ()):
            raise ValueError(f"sql: kinds must be a sequence of names, but is {kinds!r}")
        self.query, self.is_dynamic = query, is_dynamic
        self.kinds = None if kinds is None else tuple(kinds)
        self._memo = Memo()
        self._checked: tuple[str, str] | None = None

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        targets = sources if targets is None else targets
        check_examples(self, sources, targets)
        sets = (sources,) if targets is sources else (sources, targets)
        device = sources.ptr.device
        if min(sources.num_nodes, targets.num_nodes) == 0:
            size = (sources.num_nodes, targets.num_nodes)
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            return Relation.from_rows(nothing, 0, size, sources.nodes, targets.nodes)
        if self.is_dynamic:
            return self._ask(sets)
        key = (self.query, self.kinds, fingerprint(sets), device)
        return self._memo.get(key, lambda: self._ask(tuple(map(_own, sets))))

    def _ask(self, sets: tuple[NodeSet, ...]) -> Relation:
        tables = tables_of(self, sets, self.kinds, self.is_dynamic)
        with connect(f"{self!r}") as connection:
            from duckdb import Error  # there, since there is a connection

            _create(connection, tables)
            try:
                statement = self._statement(connection)
                check_columns(self, connection.sql(statement))
                # Run once, whatever is asked of its result; a last semicolon may stand there.
                connection.execute(f"CREATE TEMP TABLE found AS\n{statement}")
                return relation_of(self, connection.sql("FROM found"), sets)
            except Error as error:
                raise ValueError(
                    f"{self!r}: DuckDB cannot run the query: {error}\n\n{self._help(sets, tables)}"
                    f"\n\nThe query:\n{self.query}"
                ) from error

    def _statement(self, connection: DuckDBPyConnection) -> str:
        """The query, if it is one statement that only reads and says the same every time."""
        if self._checked is not None and self._checked[0] == self.query:
            return self._checked[1]
        statements = connection.extract_statements(self.query)
        kinds = [statement.type.name for statement in statements]
        if kinds != ["SELECT"]:
            got = f"is {kinds[0]}" if len(kinds) == 1 else f"holds {len(kinds)} statements"
            raise ValueError(
                f"{self!r} must be one SELECT, which changes nothing, but {got}; the query:\n"
                f"{self.query}"
            )
        parts = _parts_of(connection, statements[0].query)
        # Of the statements inside a WITH, too.
        changes = [part["type"] for part in parts if _is_change(part)]
        if changes:
            raise ValueError(
                f"{self!r} must be one SELECT, which changes nothing, but holds "
                f"{changes[0].split('_')[0]}; the query:\n{self.query}"
            )
        hidden = sorted(_functions(parts) & _READERS)
        if hidden:
            raise ValueError(
                f"{self!r} uses {hidden[0]}(), whose argument is a statement or a table that "
                f"cannot be looked at beforehand; write it in its place"
            )
        refused = sorted(_chances(parts))
        if refused:
            raise ValueError(
                f"{self!r} uses {', '.join(refused)}, which is not the same every time; take "
                f"hash(...) of ids and a seed, or topology.random() for edges drawn anew"
            )
        self._checked = self.query, statements[0].query
        return self._checked[1]

    def _help(self, sets: tuple[NodeSet, ...], tables: list[NodeTable]) -> str:
        columns = ", ".join(dict.fromkeys(name for table in tables for name in table.columns))
        said = f"The table nodes has the columns {columns}"
        if not self.is_dynamic:
            return f"{said}; is_dynamic=True adds x, the current states, and step."
        if any(nodes.x is None for nodes in sets):
            return f"{said}; a node set has no x, hence the table neither."
        return f"{said}."

    def __repr__(self) -> str:
        return f"sql({shorten(' '.join(self.query.split()), 60, placeholder=' ...')!r})"


def _own(nodes: NodeSet) -> NodeSet:
    """A node set whose examples are kept apart from the caller's, for what is remembered."""
    return replace(nodes, nodes=nodes.nodes.clone())


# The database ######################################################################


def connect(what: str) -> DuckDBPyConnection:
    """A connection with tables of its own to a database in memory that cannot reach anything else.

    Args:
        what: Who asks, for the error where DuckDB is missing.

    Raises:
        ImportError: If it is.
    """
    try:
        import duckdb  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs DuckDB: pip install 'nsm-graph[sql]'") from error
    return _database(os.getpid()).cursor()


@functools.cache
def _database(process: int) -> DuckDBPyConnection:
    """One for each process: a fork must not use that of its parent."""
    import duckdb

    options: dict[str, Any] = {
        "threads": "1",  # sums in one order; torch's threads need the rest of the machine
        "enable_external_access": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "python_enable_replacements": "false",  # a name must not mean a variable of the caller
        "lock_configuration": "true",
    }
    return duckdb.connect(":memory:", config=options)


def _create(connection: DuckDBPyConnection, tables: list[NodeTable]) -> None:
    """Makes the tables ``nodes``, ``sources`` and ``targets``."""
    names = ["nodes"] if len(tables) == 1 else ["sources", "targets"]
    for name, table in zip(names, tables, strict=True):
        connection.register("raw_columns", table.arrays)
        connection.execute(f"CREATE TEMP TABLE {name} AS SELECT {table.select} FROM raw_columns")
        connection.unregister("raw_columns")
    if len(tables) == 1:
        for name in ("sources", "targets"):
            connection.execute(f"CREATE TEMP VIEW {name} AS FROM nodes")
        return
    # Arrays of two lengths are lists in the table that holds both.
    first, second = (table.widths for table in tables)
    differ = [name for name in first if name in second and first[name] != second[name]]
    lists = ", ".join(f"{quoted(name)}[:] AS {quoted(name)}" for name in differ)
    star = f"SELECT * REPLACE ({lists})" if differ else "SELECT *"
    connection.execute(
        f"CREATE TEMP TABLE nodes AS {star} FROM sources UNION ALL BY NAME {star} FROM targets"
    )


# What is not the same every time #####################################################


def _parts_of(connection: DuckDBPyConnection, statement: str) -> list[dict]:
    """Every object that DuckDB's parser finds in a statement."""
    parsed = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [statement]).fetchall()
    return list(_parts(json.loads(parsed[0][0])))


def _is_change(part: dict) -> bool:
    """Whether it inserts, updates or deletes; what reads is a SELECT_NODE or the like."""
    return str(part.get("type", "")).endswith("_QUERY_NODE")


def _functions(parts: list[dict]) -> set[str]:
    return {str(part.get("function_name", "")).lower() for part in parts}


def _chances(parts: list[dict]) -> set[str]:
    """Functions, clocks and samples in a statement that may differ from run to run."""
    found = {f"{name}()" for name in _functions(parts) & (_unstable_functions() | _CLOCK_FUNCTIONS)}
    for part in parts:
        function = str(part.get("function_name", "")).lower()
        column = part.get("column_names") or [""]
        arguments = part.get("arguments") or part.get("children") or []
        if function == "age" and len(arguments) == 1:
            found.add("age() of one time, which is up to today")
        if len(column) == 1 and str(column[0]).lower() in _CLOCKS:
            found.add(str(column[0]))
        if part.get("sample") and part["sample"].get("seed", -1) < 0:
            found.add("a sample without a seed (USING SAMPLE reservoir(3 ROWS) REPEATABLE (42))")
    return found


@functools.cache
def _unstable_functions() -> frozenset[str]:
    """By what DuckDB says of its own functions."""
    rows = (
        _database(os.getpid())
        .cursor()
        .execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() "
            "WHERE stability <> 'CONSISTENT' AND function_name <> 'error'"
        )
    )
    return frozenset(name for (name,) in rows.fetchall())


def _parts(tree: object) -> Iterator[dict]:
    """Every object of a JSON tree."""
    if isinstance(tree, dict):
        yield tree
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _parts(branch)
