"""Explains a ``TypeError``: names the argument of the wrong type. Runs only after a call has failed."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union


def explain(
    error: TypeError, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise an error that names the first argument whose type is not that of the signature, if there is one.

    :param error: the error of the call ``function(*args, **kwargs)``.
    :param name: the name of the function, as callers know it.
    """
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        # Python's own message names the argument that is missing or unknown.
        return
    hints = typing.get_type_hints(function)
    for argument, value in bound.arguments.items():
        if argument in hints and not _matches(value, hints[argument]):
            words = _words(hints[argument])
            raise TypeError(f"{name}() argument {argument!r} must be {words}, not {_kind(value)}") from error


def _matches(value: object, hint: Any) -> bool:
    """Return whether ``value`` has the type ``hint``, also in the elements of a list or tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        # Another text is not a matter of type: the native module names the texts that it accepts.
        return any(isinstance(value, type(each)) for each in arguments)
    if origin in (Union, types.UnionType):
        return any(_matches(value, each) for each in arguments)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_matches, value, arguments))
    if not isinstance(value, origin or hint):
        return False
    if isinstance(value, (list, tuple)) and arguments:
        return all(_matches(each, arguments[0]) for each in value)
    return True


def _words(hint: Any) -> str:
    """Describe a type: ``str, PathLike or None``."""
    *first, last = dict.fromkeys(_alternatives(hint))
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(hint: Any) -> list[str]:
    """Return the words for a type, or for each member of a union."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return [word for each in arguments for word in _alternatives(each)]
    if origin is Literal:
        return [repr(each) for each in arguments]
    if origin is collections.abc.Callable:
        return ["a function"]
    if origin in (collections.abc.Sequence, collections.abc.Iterable):
        return [f"a list of {_words(arguments[0])}"]
    if origin is tuple:
        return [f"a pair of {_words(arguments[0])}"]
    return ["None" if hint is type(None) else str(getattr(origin or hint, "__name__", hint))]


def _kind(value: object) -> str:
    """Name the type of ``value``, or of the first element of a list."""
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} with {type(value[0]).__name__}"
    return type(value).__name__
