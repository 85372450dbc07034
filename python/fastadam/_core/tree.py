"""Nested structures of variables or arrays: lists, tuples, dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, ValuesView
from typing import Any

__all__ = ["flatten"]


def flatten(tree: Any, label: str, *, as_jax: bool = False) -> Iterator[tuple[str, Any]]:
    """Each leaf with its place, in TF's order: dicts by their sorted keys.

    Args:
        tree: The structure; what is no list, tuple or dict is a leaf.
        label: What places begin with.
        as_jax: In the order of ``jax.tree``, which differs in two things: an OrderedDict keeps its own order, and None
            is no leaf.

    Raises:
        TypeError: A dict with keys that cannot be sorted.
    """
    if isinstance(tree, Mapping):
        for key in _keys(tree, label, as_jax):
            yield from flatten(tree[key], f"{label}[{key!r}]", as_jax=as_jax)
    elif isinstance(tree, (list, tuple, Iterator, ValuesView)):
        for i, item in enumerate(tree):
            yield from flatten(item, f"{label}[{i}]", as_jax=as_jax)
    elif tree is not None or not as_jax:
        yield label, tree


def _keys(tree: Mapping[Any, Any], label: str, as_jax: bool) -> list[Any]:
    if as_jax and isinstance(tree, OrderedDict):
        return list(tree)
    try:
        return sorted(tree)
    except TypeError as error:
        raise TypeError(f"{label}: a dict with keys that have no order ({error})") from None
