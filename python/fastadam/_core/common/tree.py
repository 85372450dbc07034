"""Nested structures of variables or arrays: lists, tuples, dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, ValuesView
from typing import TypeVar

from fastadam._core.common.checks import shown
from fastadam._core.common.types import Tree

__all__ = ["flatten"]

Key = TypeVar("Key")


def flatten(tree: Tree, label: str, *, as_jax: bool = False) -> Iterator[tuple[str, Tree]]:
    """Each leaf with its path, in TensorFlow's order: dicts by their sorted keys.

    Args:
        tree: The structure; everything except lists, tuples and dicts is a leaf.
        label: The path of the root.
        as_jax: Use the order of ``jax.tree``, which differs in two ways: an OrderedDict keeps its own order, and None
            is not a leaf.

    Raises:
        TypeError: The keys of a dict cannot be sorted.
        ValueError: It is nested too deeply, or holds itself.
    """
    try:
        yield from _leaves(tree, label, as_jax)
    except RecursionError:
        raise ValueError(f"{label or 'variables'}: {type(tree).__name__} that is nested too deeply") from None


def _leaves(tree: Tree, label: str, as_jax: bool) -> Iterator[tuple[str, Tree]]:
    if isinstance(tree, Mapping):
        for key in _keys(tree, label, as_jax):
            yield from _leaves(tree[key], f"{label}[{shown(key)}]", as_jax)
    elif isinstance(tree, (list, tuple, Iterator, ValuesView)):
        for i, item in enumerate(tree):
            yield from _leaves(item, f"{label}[{i}]", as_jax)
    elif tree is not None or not as_jax:
        yield label, tree


def _keys(tree: Mapping[Key, Tree], label: str, as_jax: bool) -> list[Key]:
    if as_jax and isinstance(tree, OrderedDict):
        return list(tree)
    try:
        return sorted(tree)  # type: ignore[type-var]  # raises if the keys have no order
    except TypeError as error:
        raise TypeError(f"{label}: a dict whose keys cannot be sorted ({error})") from None
