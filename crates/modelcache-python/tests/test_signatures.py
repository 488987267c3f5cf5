"""Every blocking method has an asynchronous twin with the same arguments, made from the same definition."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
from modelcache import Metrics, ModelCache
from modelcache._calls import Pending

TWINS = [
    (owner, name)
    for owner in (ModelCache, Metrics)
    for name in vars(owner)
    if not name.startswith("_") and f"a{name}" in vars(owner)
]


def test_there_are_twins() -> None:
    names = {name for _, name in TWINS}
    assert {"get", "lease", "open", "put", "evict", "verify", "close", "text"} <= names
    plain = {"cache_dir", "remote", "metrics", "closed", "to_dict", "describe", "collect"}
    alone = {name for owner in (ModelCache, Metrics) for name in vars(owner) if not name.startswith("_")}
    assert alone == names | {f"a{name}" for name in names} | plain


@pytest.mark.parametrize(("owner", "name"), TWINS)
def test_a_method_and_its_twin_have_one_signature(owner: Any, name: str) -> None:
    method, twin = getattr(owner, name), getattr(owner, f"a{name}")
    signature = inspect.signature(method)
    assert inspect.signature(twin) == signature
    assert "Pending" not in str(signature), "callers see the result"
    assert typing.get_type_hints(twin) == typing.get_type_hints(method)
    assert typing.get_origin(typing.get_type_hints(method)["return"]) is not Pending
    assert inspect.iscoroutinefunction(twin)
    assert not inspect.iscoroutinefunction(method)
    assert (twin.__name__, twin.__qualname__) == (f"a{name}", f"{owner.__name__}.a{name}")
    assert twin.__doc__.startswith(f"Asynchronous version of :meth:`{name}`.")
    assert not method.__doc__.startswith("Asynchronous")
