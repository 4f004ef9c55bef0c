r"""Datasets by name."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsm_graph.data.digits import load_digits
from nsm_graph.data.info import Splits
from nsm_graph.data.mnist import load_mnist
from nsm_graph.data.sequences import load_task
from nsm_graph.data.tasks import TASKS
from nsm_graph.data.text import load_text
from nsm_graph.data.tu import load_tu
from nsm_graph.data.zinc import load_zinc

LOADERS: dict[str, Callable[..., Splits]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "text": load_text,
    "tu": load_tu,
    "zinc": load_zinc,
}

# What every loader takes; the rest of its signature are the dataset's own options.
COMMON = ("name", "root", "cache", "seed")


def available() -> dict[str, dict[str, Any]]:
    r"""The datasets by name, each with its own options and their defaults."""
    return {name: _options(name) for name in (*LOADERS, *TASKS)}


def load(
    name: str,
    *,
    root: str | Path = "datasets",
    cache: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Splits:
    r"""Loads a dataset as train, validation and test splits.

    Nothing is ever written under :obj:`root`.

    Args:
        name: ``"digits"``, ``"mnist"``, ``"text"``, ``"tu"``, ``"zinc"``, or a sequence task:
            a key of :data:`nsm_graph.data.tasks.TASKS`.
        root: Folder with the raw files, each dataset in ``root/<NAME>/raw``.
            (default: :obj:`"datasets"`)
        cache: Folder for processed graphs.  (default: ``~/.cache/nsm_graph``)
        seed: Draws the splits that are drawn; the same seed gives the same splits.
            (default: :obj:`0`)
        **options: The dataset's own options, see :func:`available`.

    Raises:
        ValueError: If the name or an option is unknown, or a file is damaged.
        MissingDataError: If files are missing and cannot be downloaded.
    """
    if name not in LOADERS and name not in TASKS:
        raise ValueError(f"unknown dataset {name!r}; choose one of {', '.join((*LOADERS, *TASKS))}")
    known = _options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"dataset {name!r} has no option {option!r}; its options are {', '.join(known)}"
            )
    if name in TASKS:
        return load_task(name, seed=seed, **options)
    folder = Path.home() / ".cache" / "nsm_graph" if cache is None else Path(cache).expanduser()
    return LOADERS[name](root=Path(root).expanduser(), cache=folder, seed=seed, **options)


def _options(name: str) -> dict[str, Any]:
    functions = (load_task, TASKS[name]) if name in TASKS else (LOADERS[name],)
    return {
        parameter.name: parameter.default
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in COMMON and parameter.kind is not parameter.VAR_KEYWORD
    }
