"""Checks of config values. Every message names the key, what was expected and what came."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

TYPES = ("int", "float", "str", "bool", "NoneType")


def check_types(section: Any, prefix: str) -> None:
    """Compares every field of a dataclass with its annotation (`int`, `float | None`, ...)."""
    for field in dataclasses.fields(section):
        expected = str(field.type).replace("None", "NoneType").split(" | ")
        if not set(expected) <= set(TYPES):
            continue  # a section, which checks itself
        value = getattr(section, field.name)
        # Python counts True among the integers; and 1 is a fine float.
        name = type(value).__name__
        if name not in expected and not (name == "int" and "float" in expected):
            raise ValueError(f"{prefix}{field.name}: expected {field.type}; got {value!r}")


def check_keys(values: Mapping[str, Any], cls: type, prefix: str) -> None:
    """Refuses a key that the dataclass does not have."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{prefix}{key}: unknown key; expected one of {', '.join(known)}")


def check_choice(key: str, value: object, choices: Collection[str]) -> None:
    """Refuses a value that is not among the choices; :obj:`None` is not given and passes."""
    if value is not None and value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}; got {value!r}")


def check_range(
    key: str, value: float | None, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """Refuses a number below `low` (or equal to it, with `above`), above `high`, or not finite."""
    if value is None:
        return
    if not math.isfinite(value) or value > high or (value <= low if above else value < low):
        bound = f"{'above' if above else 'at least'} {low:g}"
        bound += f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{key}: expected {bound}; got {value}")


def given(section: Any) -> dict[str, Any]:
    """Every key of a section that has a value."""
    return {key: value for key, value in vars(section).items() if value is not None}
