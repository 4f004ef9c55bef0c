"""Numba's compiler with a disk cache, and a word about it when it takes long."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache, update_wrapper
from pathlib import Path
from typing import Any

import numba
import numpy as np

logger = logging.getLogger("nsm_graph")

#: Sums may be reordered; NaN and infinity keep their meaning.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}

#: For kernels that allocate nothing: where arrays count references, every slice costs two locked
#: instructions, together a seventh of the segment loop.
BORROWING: dict[str, Any] = {**OPTIONS, "_nrt": False}

#: For the parts of such kernels: nobody calls them from outside, and compiling is shorter.
INNER: dict[str, Any] = {**BORROWING, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

#: For what is called token by token: arrays are passed number by number, which would take longer.
INLINE: dict[str, Any] = {**INNER, "forceinline": True}

#: Loading from disk takes less; whoever waits longer waits for the compiler.
PATIENCE = 2.0


@cache
def _digest() -> str:
    """Of all that kernels are made of; Numba looks at a kernel's own file only."""
    sources = Path(__file__).parents[1].rglob("*.py")
    parts = sorted(source for source in sources if "cpu" in (source.stem, source.parent.name))
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]


class Kernel:
    """A compiled function: once for each combination of argument types, kept on disk.

    Where no folder for it can be written, every process compiles anew. Whoever waits for the
    compiler reads why, in the log named ``nsm_graph``.
    """

    def __init__(self, function: Callable[..., None], options: Mapping[str, Any] = OPTIONS) -> None:
        update_wrapper(self, function)
        self.name = function.__name__
        function.__qualname__ = f"{self.name}_{_digest()}"  # names the file on disk
        try:
            self._compiled = numba.njit(cache=True, **options)(function)
            self._fate = "it is kept on disk"
        except RuntimeError:  # numba found no folder that it can write
            self._compiled = numba.njit(**options)(function)
            self._fate = "no folder to keep it in could be written"
        self._ready: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, *arguments: object) -> None:
        types = "".join(x.dtype.char for x in arguments if isinstance(x, np.ndarray))
        if types in self._ready:
            self._compiled(*arguments)
            return
        with self._lock:
            notice = threading.Timer(PATIENCE, self._say)
            notice.start()
            try:
                self._compiled(*arguments)
            finally:
                notice.cancel()
            self._ready.add(types)

    def _say(self) -> None:
        logger.warning("compiling %s, once for these types of arguments; %s", self.name, self._fate)
