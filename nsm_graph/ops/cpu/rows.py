"""Loops over rows that Numba makes vector code of: what has no other stride than one.

A slice of columns of a matrix does not become vector code as it is; a view of one row does.
"""

from __future__ import annotations

import numba

from nsm_graph.ops.cpu.compiled import INLINE, INNER


@numba.njit(**INLINE)
def copy(target, source):  # type: ignore[no-untyped-def]
    """``target = source``, as many numbers as the target has."""
    for j in range(target.shape[0]):
        target[j] = source[j]


@numba.njit(**INLINE)
def add(total, row):  # type: ignore[no-untyped-def]
    """``total += row``, as many numbers as the total has."""
    for j in range(total.shape[0]):
        total[j] += row[j]


@numba.njit(**INNER)
def add_columns(total, rows, first):  # type: ignore[no-untyped-def]
    """Adds up the columns of a matrix from ``first`` on, as many as the total has."""
    for i in range(rows.shape[0]):
        row = rows[i, first : first + total.shape[0]]
        for j in range(total.shape[0]):
            total[j] += row[j]


@numba.njit(**INNER)
def copy_rows(target, source, first, width):  # type: ignore[no-untyped-def]
    """``target[:, first : first + width] = source``, for as many rows as the source has."""
    for i in range(source.shape[0]):
        given, own = source[i], target[i, first : first + width]
        for j in range(width):
            own[j] = given[j]


@numba.njit(**INNER)
def add_rows(total, rows):  # type: ignore[no-untyped-def]
    """``total[: len(rows)] += rows``."""
    for i in range(rows.shape[0]):
        own, given = total[i], rows[i]
        for j in range(own.shape[0]):
            own[j] += given[j]
