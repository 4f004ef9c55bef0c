"""A method that makes a new object when called on a class, and fills one when called on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


class on_class_or_object:
    """Decorator: the function gets the object it is called on, or else the class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        called_on = owner if instance is None else instance

        @wraps(self.function)
        def call(*arguments: Any, **options: Any) -> Any:
            return self.function(called_on, *arguments, **options)

        return call
