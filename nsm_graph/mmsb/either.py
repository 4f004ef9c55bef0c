"""A method that makes a new object when called on a class, and fills one when called on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any


class on_class_or_object:
    """Decorator: the function gets the object it is called on, or else the class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        update_wrapper(self, function)
        signature = inspect.signature(function)
        _, *others = signature.parameters.values()
        self._signature = signature.replace(parameters=others)

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        called_on = owner if instance is None else instance

        def call(*arguments: Any, **options: Any) -> Any:
            return self.function(called_on, *arguments, **options)

        update_wrapper(call, self.function)
        call.__signature__ = self._signature  # type: ignore[attr-defined]
        return call
