"""Values that no argument expects, and spoiled copies of values that were good."""

from __future__ import annotations

import decimal
import fractions
import itertools
import pathlib
import tempfile
import types

import numpy as np


class Mine(Exception):  # noqa: N818
    """Raised by a hostile object: it may come through as it is."""


def _raises(*_, **__):
    raise Mine("of the caller")


def _object(**methods):
    """An object whose special methods raise, or return what is given."""
    made = {
        f"__{name}__": _raises if result is _raises else (lambda *_, result=result, **__: result)
        for name, result in methods.items()
    }
    return type("Hostile", (), made)()


class _NoRepr:
    __repr__ = __str__ = _raises


class _Float(float):
    __float__ = _raises


class _Int(int):
    __index__ = __int__ = _raises


class _Str(str):
    __slots__ = ()
    __eq__ = _raises
    __hash__ = str.__hash__


class _List(list):
    __iter__ = _raises


class _Array(np.ndarray):
    def __array_finalize__(self, source):
        pass

    def __array_ufunc__(self, *_, **__):
        raise Mine("of the caller")


class _Interface:
    def __init__(self, value):
        self.__array_interface__ = value


class _Sequence:
    """Says that it is longer than it is."""

    def __len__(self):
        return 5

    def __getitem__(self, at):
        if at:
            raise IndexError(at)
        return 1.0


def _readonly(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


def _cycle():
    values = []
    values.append(values)
    return values


def _deep(levels=3000):
    values = []
    for _ in range(levels):
        values = [values]
    return values


def _memmap(mode):
    with tempfile.TemporaryFile() as file:
        file.write(bytes(32))
        file.flush()
        return np.memmap(file, np.float32, mode, shape=(8,))


SCALARS = {
    "none": None,
    "ellipsis": ...,
    "not implemented": NotImplemented,
    "true": True,
    "false": False,
    "numpy true": np.bool_(True),
    "minus one": -1,
    "zero": 0,
    "minus zero": -0.0,
    "half": 0.5,
    "one": 1,
    "three": 3,
    "huge": 10**30,
    "hugest": 10**5000,
    "minus huge": -(10**30),
    "2^31": 2**31,
    "2^62": 2**62,
    "2^63": 2**63,
    "2^64": 2**64,
    "minus 2^63": -(2**63),
    "nan": float("nan"),
    "inf": float("inf"),
    "minus inf": float("-inf"),
    "subnormal": 5e-324,
    "1e-46": 1e-46,
    "1e39": 1e39,
    "1e308": 1e308,
    "complex": 1j,
    "numpy complex": np.complex64(1),
    "longdouble": np.longdouble(1),
    "numpy int8": np.int8(-1),
    "numpy uint64": np.uint64(2**64 - 1),
    "numpy nan": np.float16("nan"),
    "decimal": decimal.Decimal("0.1"),
    "decimal nan": decimal.Decimal("sNaN"),
    "fraction": fractions.Fraction(1, 3),
    "datetime": np.datetime64("2020-01-01"),
    "timedelta": np.timedelta64(1, "s"),
    "empty string": "",
    "string": "adam",
    "digits": "0.1",
    "surrogate": "\udcff",
    "zero byte": "a\0b",
    "right to left": "\u202e\u0661",
    "long string": "x" * 70_000,
    "numpy string": np.str_("dense"),
    "bytes": b"dense",
    "bytearray": bytearray(8),
    "path": pathlib.PurePosixPath("/dev/null/x"),
    "root": pathlib.Path("/"),
    "slice": slice(1, 2),
    "type": _NoRepr,
    "module": types,
    "function": lambda: 0.1,
    "function that raises": _raises,
    "function of many": lambda *_, **__: None,
    "function of text": lambda *_: "x",
    "function of nan": lambda *_: float("nan"),
    "function of an array": lambda *_: np.ones(3),
    "dtype": np.dtype("f4"),
    "structured dtype": np.dtype([("a", "f4")]),
    "dtype name": "float32",
    "unknown dtype": "f3",
}

MADE = {
    "object": object,
    "memoryview": lambda: memoryview(b"12345678"),
    "writable memoryview": lambda: memoryview(bytearray(8)),
    "empty tuple": tuple,
    "empty list": list,
    "empty dict": dict,
    "empty set": set,
    "list of none": lambda: [None],
    "list of text": lambda: ["a", "b"],
    "ragged": lambda: [[1.0], [1.0, 2.0]],
    "list of itself": _cycle,
    "deep list": _deep,
    "dict of itself": lambda: (lambda d: d.update(a=d) or d)({}),
    "odd keys": lambda: {1: 2, None: 3, (1,): 4, "a": _object()},
    "config": lambda: {"class_name": "os.system", "config": {"command": "true"}},
    "config of config": lambda: {"class_name": "ExponentialDecay", "config": []},
    "generator": lambda: (x for x in [1.0]),
    "empty generator": lambda: iter(()),
    "generator that raises": lambda: (_raises() for _ in [1]),
    "map": lambda: map(_raises, [1]),
    "endless": lambda: itertools.islice(itertools.repeat(1.0), 100_000),
    "range": lambda: range(3),
    "frozenset": lambda: frozenset([1]),
    "dict view": lambda: {"a": 1}.keys(),
    "namespace": lambda: types.SimpleNamespace(shape=(3,), dtype="float32", values=1, indices=2),
    "no repr": _NoRepr,
    "float that raises": lambda: _Float(0.1),
    "int that raises": lambda: _Int(3),
    "string that raises": lambda: _Str("dense"),
    "list that raises": lambda: _List([1]),
    "longer than it is": _Sequence,
    "float raises": lambda: _object(float=_raises),
    "float lies": lambda: _object(float="1"),
    "float of nan": lambda: _object(float=float("nan")),
    "index raises": lambda: _object(index=_raises),
    "index lies": lambda: _object(index=1.5),
    "index is huge": lambda: _object(index=10**40),
    "bool raises": lambda: _object(bool=_raises),
    "bool lies": lambda: _object(bool=2),
    "eq raises": lambda: _object(eq=_raises, hash=_raises),
    "hash raises": lambda: _object(hash=_raises),
    "len raises": lambda: _object(len=_raises, getitem=_raises),
    "len is negative": lambda: _object(len=-1, iter=iter(())),
    "len is huge": lambda: _object(len=2**62, getitem=1.0),
    "iter raises": lambda: _object(iter=_raises),
    "iter lies": lambda: _object(iter=3),
    "array raises": lambda: _object(array=_raises),
    "array lies": lambda: _object(array="x"),
    "array is none": lambda: _object(array=None),
    "fspath lies": lambda: _object(fspath=3),
    "fspath raises": lambda: _object(fspath=_raises),
    "fspath of bytes": lambda: _object(fspath=b"\xff"),
    "call lies": lambda: _object(call="x"),
    "attributes raise": lambda: _object(getattr=_raises),
    "dlpack raises": lambda: _object(dlpack=_raises, dlpack_device=(1, 0)),
    "dlpack lies": lambda: _object(dlpack=3, dlpack_device=(1, 0)),
    "dlpack elsewhere": lambda: _object(dlpack=3, dlpack_device="cpu"),
    "interface of none": lambda: _Interface(None),
    "interface without data": lambda: _Interface({"shape": (3,), "typestr": "<f4", "version": 3}),
    "interface without type": lambda: _Interface({"shape": (3,), "data": (0, False), "version": 3}),
    "interface of text": lambda: _Interface({"shape": "x", "typestr": "<f4", "data": (0, False), "version": 3}),
    "interface null": lambda: _Interface({"shape": (3,), "typestr": "<f4", "data": (0, False), "version": 3}),
    "empty array": lambda: np.zeros(0, np.float32),
    "array of objects": lambda: np.array([None, object()], object),
    "array of arrays": lambda: np.array([np.zeros(2), np.zeros(3)], object),
    "structured": lambda: np.zeros(3, [("a", "f4"), ("b", "O")]),
    "record": lambda: np.rec.array([(1.0,)], dtype=[("a", "f4")]),
    "masked": lambda: np.ma.ones(3, np.float32),
    "masked constant": lambda: np.ma.masked,
    "matrix": lambda: np.asmatrix(np.ones((2, 2))),
    "chars": lambda: np.char.array(["a"]),
    "0-d": lambda: np.array(1.0, np.float32),
    "0-d of object": lambda: np.array(None, object),
    "32 dimensions": lambda: np.ones((1,) * 32, np.float32),
    "broadcast": lambda: np.broadcast_to(np.float32(1), (2**40,)),
    "read-only memmap": lambda: _memmap("r"),
    "copy-on-write memmap": lambda: _memmap("c"),
    "array that raises": lambda: np.ones(3, np.float32).view(_Array),
    "unicode array": lambda: np.array(["1", "2"]),
    "array of bytes": lambda: np.array([b"1"]),
    "void": lambda: np.zeros(3, "V4"),
    "datetimes": lambda: np.zeros(3, "M8[s]"),
    "random state": lambda: np.random.RandomState(0),
}

ARRAYS = {
    "read-only": _readonly,
    "strided": lambda a: np.repeat(a, 2, -1)[..., ::2] if a.ndim else a,
    "reversed": lambda a: a[::-1] if a.ndim else a,
    "fortran": np.asfortranarray,
    "transposed": lambda a: a.T,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "itself": lambda a: a,
    "a view": lambda a: a[...],
    "a part": lambda a: a[:-1] if a.ndim else a,
    "overlapping": lambda a: np.lib.stride_tricks.as_strided(a, (2, *a.shape), (0, *a.strides)),
    "of zeros stride": lambda a: np.broadcast_to(np.array(1, a.dtype), a.shape),
    "misaligned": lambda a: np.frombuffer(bytearray(a.nbytes + 1), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    "more": lambda a: np.concatenate([a, a]) if a.ndim else np.ones(2, a.dtype),
    "one more axis": lambda a: a[None],
    "flat": np.ravel,
    "empty": lambda a: a[:0] if a.ndim else a,
    "nan": lambda a: np.full_like(a, np.nan) if a.dtype.kind in "fc" else a,
    "inf": lambda a: np.full_like(a, np.inf) if a.dtype.kind in "fc" else a,
    "negative": lambda a: -abs(a.astype(np.float64)).astype(a.dtype) - 1 if a.dtype.kind in "fi" else a,
    "far": lambda a: np.full_like(a, 2**62) if a.dtype.kind == "i" else a,
    "list": lambda a: a.tolist(),
    "bytes": lambda a: a.tobytes(),
    "subclass": lambda a: a.copy().view(_Array),
    "masked": lambda a: np.ma.masked_array(a, np.zeros(a.shape, bool)),
    "matrix": lambda a: np.asmatrix(a) if a.ndim <= 2 else a,
    "objects": lambda a: a.astype(object),
    **{f"as {kind}": lambda a, kind=kind: a.astype(kind) for kind in ("?", "i1", "u8", "f2", "f4", "f8", "g", "c8", "U4", "S4")},
}  # fmt: skip


def value(rng):
    """The name of a hostile value, and the value."""
    names = [*SCALARS, *MADE]
    name = names[rng.integers(len(names))]
    return name, SCALARS[name] if name in SCALARS else MADE[name]()


def spoiled(rng, good, level=0):
    """A description and a value in the place of a good one: something else altogether, or the same with a fault."""
    roll = rng.random()
    if isinstance(good, np.ndarray) and roll < 0.6:
        names = list(ARRAYS)
        name = names[rng.integers(len(names))]
        return f"array {name}", ARRAYS[name](good)
    if isinstance(good, (list, tuple)) and len(good) and level < 3 and roll < 0.75:
        items, at = list(good), int(rng.integers(len(good)))
        how = rng.integers(6)
        if how == 0:
            del items[at]
            text = f"without [{at}]"
        elif how == 1:
            items.append(items[at])
            text = f"[{at}] twice"
        elif how == 2:
            items.insert(at, value(rng)[1])
            text = f"something before [{at}]"
        else:
            text, items[at] = spoiled(rng, items[at], level + 1)
            text = f"[{at}] {text}"
        try:
            return text, items if type(good) in (list, tuple) and rng.random() < 0.3 else type(good)(items)
        except TypeError:  # a named tuple
            return text, tuple(items)
    if isinstance(good, dict) and good and level < 3 and roll < 0.75:
        items, keys = dict(good), list(good)
        key, how = keys[rng.integers(len(keys))], rng.integers(5)
        if how == 0:
            del items[key]
            return f"without {key!r}", items
        if how == 1:
            name, items["other"] = value(rng)
            return f"'other': {name}", items
        text, items[key] = spoiled(rng, items[key], level + 1)
        return f"[{key!r}] {text}", items
    return value(rng)
