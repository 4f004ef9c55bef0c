r"""Sequence tasks by name."""

import inspect
from collections.abc import Callable
from typing import Any

from nsm_graph.data.tasks.arithmetic import ModularArithmetic
from nsm_graph.data.tasks.base import SequenceTask
from nsm_graph.data.tasks.bindings import Bindings
from nsm_graph.data.tasks.brackets import ModularArithmeticBrackets
from nsm_graph.data.tasks.copying import Copy, SelectiveCopy
from nsm_graph.data.tasks.groups import WordProblem, alternating_group, symmetric_group
from nsm_graph.data.tasks.induction import Induction
from nsm_graph.data.tasks.parity import Parity
from nsm_graph.data.tasks.recall import MultiQueryRecall


def _s3() -> WordProblem:
    return WordProblem(symmetric_group(3))


def _a5() -> WordProblem:
    return WordProblem(alternating_group(5))


def _s5() -> WordProblem:
    return WordProblem(symmetric_group(5))


TASKS: dict[str, Callable[..., SequenceTask]] = {
    "parity": Parity,
    "modular_arithmetic": ModularArithmetic,
    "modular_arithmetic_brackets": ModularArithmeticBrackets,
    "s3": _s3,
    "a5": _a5,
    "s5": _s5,
    "mqar": MultiQueryRecall,
    "copy": Copy,
    "selective_copy": SelectiveCopy,
    "induction": Induction,
    "bindings": Bindings,
}


def make_task(name: str, **options: Any) -> SequenceTask:
    r"""A sequence task by name.

    Args:
        name: A key of :data:`TASKS`.
        **options: The task's own options, the arguments of its class.

    Raises:
        ValueError: If the name or an option is unknown, or an option is out of range.

    Example:
        >>> make_task("mqar", num_pairs=8)
        MultiQueryRecall(vocab_size=8192, num_pairs=8, power=0.01, filler='random')
        >>> make_task("s5").num_classes
        120
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    known = list(inspect.signature(TASKS[name]).parameters)
    for option in options:
        if option not in known:
            its = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"task {name!r} has no option {option!r}; {its}")
    return TASKS[name](**options)
