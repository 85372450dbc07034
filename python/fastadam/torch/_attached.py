"""Attached weights: whatever PyTorch does with one, it finds the rows that it reads after all steps.

In a deferred mode the weight of an attached module becomes an :class:`AttachedParameter`. PyTorch calls the
``__torch_function__`` of such a parameter in place of any function that is given it. There rows are brought up to date
first: those that an embedding looks up, and all of them for a function that is not known to leave the values alone.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn import functional

from fastadam._core.common.types import AnyArray
from fastadam.torch._checks import check_rows

__all__ = ["AttachedParameter", "attach_to", "inside", "release"]

inside = torch._C.DisableTorchFunctionSubclass  # a context in which parameters are used as they are in memory


class Owner:
    """The optimizer that an attached parameter belongs to.

    Args:
        param: The parameter, whose memory aliases share.
        read: Called before rows of it are read, or all rows for None; it does nothing while the optimizer itself reads.
    """

    def __init__(self, param: Tensor, read: Callable[[Tensor, AnyArray | None], None]) -> None:
        self.param, self._read = param, read
        self.number = id(self)
        _known[self.number] = self

    def prepare(self, rows: AnyArray | None = None) -> None:
        """Bring rows up to date that are about to be read, or all."""
        if rows is None and _is_transformed():
            with torch.no_grad(), inside():
                torch.ops.fastadam.prepare_all(self.param, self.number)
        else:
            self._read(self.param, rows)


_known: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()


class AttachedParameter(torch.nn.Parameter):
    """A parameter of an optimizer in a deferred mode, or what shares its memory: ``detach()`` and ``data``."""

    _fastadam_owner: Owner | None = None

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> torch.nn.Parameter:
        """What ``type(parameter)(...)`` makes belongs to no optimizer."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Call a function of PyTorch, after the rows that it may read have been brought up to date."""
        if not torch.compiler.is_compiling():
            return _call(func, args, kwargs or {})
        if func in _LOOKUPS and isinstance(args[1], AttachedParameter) and args[1]._fastadam_owner is not None:
            number = args[1]._fastadam_owner.number
            with inside():
                return func(torch.ops.fastadam.prepare(args[0], number), *args[1:], **(kwargs or {}))
        if func in _READ_NO_VALUES:
            with inside():
                return func(*args, **(kwargs or {}))
        return _function_of_all_rows_of_an_attached_weight(func, args, kwargs or {})

    def set_(self, *args: object, **named: object) -> Tensor:
        """PyTorch does not tell ``__torch_function__`` of this method, nor of the next."""
        _prepare_all([self, *args])
        with inside():
            return super().set_(*args, **named)

    def as_subclass(self, cls: type[Tensor]) -> Tensor:
        """A tensor of another class with the same memory."""
        _prepare_all([self])
        with inside():
            return super().as_subclass(cls)

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        """A copy that belongs to no optimizer; a copy of the optimizer attaches it again."""
        if id(self) not in memo:
            memo[id(self)] = copy.deepcopy(_plain(self), memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickled like a copy."""
        pickled: tuple[Any, ...] = _plain(self).__reduce_ex__(protocol)
        return pickled

    def __repr__(self) -> str:
        return repr(_plain(self))


def attach_to(param: Tensor, read: Callable[[Tensor, AnyArray | None], None]) -> None:
    """Make a parameter an attached one, in place; the steps of an optimizer that it belonged to are made first."""
    if isinstance(param, AttachedParameter) and param._fastadam_owner is not None:
        param._fastadam_owner.prepare()
    param.__class__ = AttachedParameter
    _owned(param, Owner(param, read))


def release(param: Tensor, attached: list[Tensor]) -> bool:
    """Make a parameter a plain one and take it out of a list of attached ones; False if it is not among these."""
    places = [place for place, each in enumerate(attached) if each is param]
    for place in reversed(places):
        del attached[place]
    if places and isinstance(param, AttachedParameter):
        param.__class__ = torch.nn.Parameter
        del param._fastadam_owner
    return bool(places)


def _owned(param: Tensor, owner: Owner | None) -> Tensor:
    param._fastadam_owner = owner
    return param


def _plain(param: AttachedParameter) -> Tensor:
    """A tensor that belongs to no optimizer, with the same memory, up to date, and the same attributes."""
    owner = param._fastadam_owner
    _prepare_all([param])
    with inside():
        is_parameter = owner is None or owner.param is param or param.requires_grad
        plain = torch.nn.Parameter(param.data, param.requires_grad) if is_parameter else param.data
    vars(plain).update({name: value for name, value in vars(param).items() if name != "_fastadam_owner"})
    return plain


# ---- which rows a function reads ------------------------------------------------------------------------------------

_LOOKUPS = frozenset({functional.embedding, functional.embedding_bag})  # (ids, weight, ...)
_ALIASES = frozenset({Tensor.detach, Tensor.data.__get__})

# Properties are functions, too: that of `grad` is `Tensor.grad.__get__`. Whatever is not here may read all rows.
_READ_NO_VALUES = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        *("grad", "requires_grad", "is_leaf", "grad_fn", "_backward_hooks", "_post_accumulate_grad_hooks"),
        *("shape", "ndim", "dtype", "device", "layout", "is_sparse", "is_cuda", "is_meta"),
    )
) | {
    *(Tensor.grad.__set__, Tensor.grad.__delete__, Tensor.requires_grad.__set__, Tensor.requires_grad_),
    *(Tensor.register_hook, Tensor.register_post_accumulate_grad_hook),
    *(Tensor.size, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__),
}


def _call(func: Callable[..., object], args: tuple[object, ...], named: dict[str, object]) -> object:
    if func in _READ_NO_VALUES:
        with inside():
            return func(*args, **named)
    others = args
    if func in _LOOKUPS and isinstance(args[1], AttachedParameter) and args[1]._fastadam_owner is not None:
        others = args[2:]
        args = (_looked_up(args[0], args[1]._fastadam_owner), *args[1:])
    _prepare_all((*others, *named.values()))
    with inside():
        result = func(*args, **named)
    if func in _ALIASES and isinstance(result, Tensor) and isinstance(args[0], AttachedParameter):
        return _owned(result.as_subclass(AttachedParameter), args[0]._fastadam_owner)
    return result


# The name is what torch.compile(fullgraph=True) complains of; otherwise it breaks the graph here.
@torch._disable_dynamo
def _function_of_all_rows_of_an_attached_weight(
    func: Callable[..., object], args: tuple[object, ...], named: dict[str, object]
) -> object:
    if torch.compiler.is_compiling():  # it is the compiler that asks, and does not want values
        with inside():
            return func(*args, **named)
    return _call(func, args, named)


def _prepare_all(values: Iterable[object]) -> None:
    """Bring all rows of the attached parameters among these values, or in lists of them, up to date."""
    for value in values:
        if isinstance(value, AttachedParameter):
            if value._fastadam_owner is not None:
                value._fastadam_owner.prepare()
        elif isinstance(value, (list, tuple)):
            _prepare_all(value)


def _looked_up(ids: object, owner: Owner) -> object:
    """The ids of a lookup, whose rows are up to date once they are known."""
    if _is_transformed() and isinstance(ids, Tensor):
        with inside():
            return torch.ops.fastadam.prepare(ids, owner.number)
    with contextlib.suppress(TypeError, ValueError, NotImplementedError):  # of ids that PyTorch refuses, too
        owner.prepare(check_rows(owner.param, ids))
    return ids


def _is_transformed() -> bool:
    """Whether functions are transformed or traced, so that only operators find the memory of tensors."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0


# Operators that bring rows up to date, for graphs and transformations. A lookup reads the ids that `prepare` returns,
# so that it comes later.
_library = torch.library.Library("fastadam", "FRAGMENT")
_library.define("prepare(Tensor ids, int owner) -> Tensor")
_library.define("prepare_all(Tensor weight, int owner) -> Tensor")


def _prepare(ids: Tensor, number: int) -> Tensor:
    owner = _known.get(number)
    if owner is not None:
        _looked_up(ids, owner)
    return ids.clone()


def _prepare_weight(weight: Tensor, number: int) -> Tensor:
    owner = _known.get(number)
    if owner is not None:
        owner.prepare()
    return weight.new_empty(0)


def _prepare_batch(_: object, dims: tuple[int | None, ...], ids: Tensor, number: int) -> tuple[Tensor, int | None]:
    """The rows are the same in whatever batch their ids come."""
    return torch.ops.fastadam.prepare(ids, number), dims[0]


_library.impl("prepare", _prepare, "CPU")
_library.impl("prepare_all", _prepare_weight, "CPU")
torch.library.register_fake("fastadam::prepare", lambda ids, _: torch.empty_like(ids), lib=_library)
torch.library.register_fake("fastadam::prepare_all", lambda weight, _: weight.new_empty(0), lib=_library)
if hasattr(torch.library, "register_vmap"):  # since PyTorch 2.5
    torch.library.register_vmap("fastadam::prepare", _prepare_batch, lib=_library)
