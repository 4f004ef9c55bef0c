"""Numba's compiler with a disk cache, and a word about it when it had to compile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import numba

logger = logging.getLogger("nsm_graph")

#: Sums may be reordered; NaN and infinity keep their meaning.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


class Kernel:
    """A compiled function: once for each combination of argument types, kept on disk.

    Where no folder for it can be written, every process compiles anew. Whoever waited for the
    compiler reads why, in the log named ``nsm_graph``.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        update_wrapper(self, function)
        try:
            self._compiled = numba.njit(cache=True, **OPTIONS)(function)
        except RuntimeError:  # numba found no folder that it can write
            self._compiled = numba.njit(**OPTIONS)(function)

    def __call__(self, *arguments: object) -> None:
        num_known = len(self._compiled.overloads)
        start = time.perf_counter()
        self._compiled(*arguments)
        if len(self._compiled.overloads) > num_known and self._compiled.stats.cache_misses:
            logger.warning(
                "compiled %s in %.1f s; later processes find it on disk",
                self.__name__,  # type: ignore[attr-defined]
                time.perf_counter() - start,
            )
