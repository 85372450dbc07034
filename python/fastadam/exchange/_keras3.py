"""The variables of a Keras 3 Adam or AdamW, from the optimizer itself or from a file."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam._core.checks import check_iterations, check_list, check_number
from fastadam._core.extras import ACCUMULATOR
from fastadam._core.gradients import bfloat16_to_float32
from fastadam._core.keywords import suggests_keywords
from fastadam._core.parts import parts_of
from fastadam.exchange._state import Array, assign, check_adam, copies_of_slots

if TYPE_CHECKING:
    from fastadam._core.adam import Adam
    from fastadam._core.types import ArrayLike, VariableLike

__all__ = ["from_keras3_variables", "read_keras3_file", "to_keras3_variables"]

_VARIABLES = "optimizer/vars"


@suggests_keywords()
def to_keras3_variables(optimizer: Adam, variables: Iterable[VariableLike]) -> dict[str, Array]:
    """What ``save_own_variables`` of a Keras 3 Adam or AdamW stores, for its ``load_own_variables``.

    The keys "0", "1", ... hold: iteration; the learning rate, unless it is a schedule or a callable; with ``use_ema``
    all averages; m and v of each variable in turn; with ``amsgrad`` all vhat. No other hyperparameter is there, and
    Keras keeps the learning rate in float32. The Keras optimizer has to be built, and to have the same options: it
    skips a dict of another length with no more than a warning.

    Args:
        optimizer: The optimizer, which is not changed.
        variables: Its variables, in the order that Keras built its optimizer with (``model.trainable_variables``).

    Raises:
        ValueError: A variable without these slots; ``decay``, which Keras 3 does not have; more steps than its
            counter holds.

    Source: ``keras/src/optimizers/base_optimizer.py`` and ``adam.py`` of Keras 3.

    >>> import numpy as np, fastadam
    >>> w = np.ones(2, np.float32)
    >>> opt = fastadam.Adam(0.5, beta_1=0.5)
    >>> step = opt.apply_gradients([(np.ones(2, np.float32), w)])
    >>> stored = fastadam.exchange.to_keras3_variables(opt, [w])
    >>> stored["0"], stored["1"], stored["2"]
    (array(1, dtype=int32), array(0.5, dtype=float32), array([0.5, 0.5], dtype=float32))
    """
    check_adam(optimizer)
    if optimizer.decay:
        raise ValueError(f"decay: {optimizer.decay}, expected 0, for Keras 3 has none; use a schedule")
    if optimizer.iterations >= 2**31:
        raise ValueError(f"iterations: {optimizer.iterations}, expected less than 2**31, which Keras's int32 holds")
    slots = copies_of_slots(optimizer, variables, parts_of(optimizer).options.slot_names)
    moments = [array for pair in zip(slots["m"], slots["v"], strict=True) for array in pair]
    rate = [np.array(optimizer.learning_rate, np.float32)] if _has_constant_rate(optimizer) else []
    arrays = [
        np.array(optimizer.iterations, np.int32),
        *rate,
        *slots.get("average", []),
        *moments,
        *slots.get("vhat", []),
    ]
    return {str(i): array for i, array in enumerate(arrays)}


@suggests_keywords()
def from_keras3_variables(
    optimizer: Adam,
    weights: Mapping[str, ArrayLike] | Iterable[ArrayLike],
    variables: Iterable[VariableLike],
) -> None:
    """Set the state of these variables, and the learning rate, from the variables of a Keras 3 Adam or AdamW.

    The variables do not say what they are. The optimizer has to have the Keras optimizer's options: a number as
    ``learning_rate`` where that had one, a schedule or callable where that had one, ``amsgrad``, ``use_ema``; and its
    betas, ``epsilon`` (the same convention) and ``weight_decay``. The steps that follow agree within rounding: Keras
    multiplies by the double ``1 - beta``, this optimizer, as TF, by the difference of float32 numbers.

    Gradient accumulators are refused. If the Keras optimizer has ``gradient_accumulation_steps=k``, finish the
    accumulation cycle, remove the accumulators from the list (one for each variable, before the first m), and divide
    the iteration, which counts calls, by k. Schedules and averages advance with every call in Keras and with every step
    here.

    Args:
        optimizer: The optimizer to change.
        weights: What ``save_own_variables`` stored or :func:`read_keras3_file` read, or the list of the values of
            ``optimizer.variables``.
        variables: The variables, in the order that Keras built its optimizer with (``model.trainable_variables``).

    Raises:
        ValueError: Another number of arrays than these options have, gradient accumulators among them, or other
            shapes. Nothing is changed.

    Source: ``keras/src/optimizers/base_optimizer.py`` and ``adam.py`` of Keras 3.

    >>> import numpy as np, fastadam
    >>> w = np.ones(2, np.float32)
    >>> opt = fastadam.Adam()
    >>> stored = {"0": 7, "1": np.float32(0.5), "2": np.full(2, 0.5), "3": np.full(2, 0.25)}
    >>> fastadam.exchange.from_keras3_variables(opt, stored, [w])
    >>> int(opt.iterations), opt.learning_rate, opt.get_slot(w, "v")
    (7, 0.5, array([0.25, 0.25], dtype=float32))
    """
    check_adam(optimizer)
    given, arrays = check_list("variables", variables), _listed(weights)
    layout = _layout(optimizer, len(given))
    if len(arrays) != len(layout):
        raise ValueError(_another_number(optimizer, len(arrays), layout, len(given)))
    parts: dict[str, list[Any]] = {part: [] for part in layout}
    for part, array in zip(layout, arrays, strict=True):
        parts[part].append(array)
    iterations = check_iterations("weights[0]", parts.pop("iteration")[0])
    hyper = {"learning_rate": check_number("weights[1]", rate[0])} if (rate := parts.pop("learning_rate", None)) else {}
    slots = {name: parts.get(name, []) for name in parts_of(optimizer).options.slot_names if name != ACCUMULATOR}
    assign(optimizer, given, iterations, slots, hyper)


@suggests_keywords()
def read_keras3_file(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The optimizer's variables in a ``.weights.h5`` or ``.keras`` file of Keras 3, for :func:`from_keras3_variables`.

    bfloat16 variables become float32. Nothing in the file is run.

    Args:
        path: What ``model.save_weights`` or ``model.save`` wrote.

    Raises:
        ImportError: h5py is not installed.
        OSError: The file cannot be read.
        ValueError: There is no optimizer in it, or a link out of the file.

    Source: ``keras/src/saving/saving_lib.py`` of Keras 3: group ``optimizer/vars``, datasets "0", "1", ...

    >>> import importlib.util, pathlib, tempfile, fastadam
    >>> if importlib.util.find_spec("h5py"):
    ...     import h5py
    ...     with tempfile.TemporaryDirectory() as folder:
    ...         path = pathlib.Path(folder, "model.weights.h5")
    ...         with h5py.File(path, "w") as file:
    ...             file["optimizer/vars/0"] = 2
    ...         assert fastadam.exchange.read_keras3_file(path) == {"0": 2}
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading a weights file of Keras needs h5py: pip install h5py") from error
    name = os.fsdecode(path)
    with h5py.File(_weights_of(name), "r") as file:
        group = file.get(_VARIABLES)
        if group is None:
            raise ValueError(f"{name}: no group '{_VARIABLES}', expected a file of a model with a built optimizer")
        if group.file.filename != file.filename:
            raise ValueError(f"{name}: '{_VARIABLES}' is a link to {group.file.filename}, expected it in this file")
        return {key: _read(group, key) for key in sorted(group, key=_index)}


def _weights_of(name: str) -> str | io.BytesIO:
    if not zipfile.is_zipfile(name):
        return name
    with zipfile.ZipFile(name) as archive:
        if "model.weights.h5" not in archive.namelist():
            raise ValueError(f"{name}: an archive without 'model.weights.h5', expected a .keras file")
        return io.BytesIO(archive.read("model.weights.h5"))


def _read(group: Any, key: str) -> Array:
    dataset = group[key] if type(group.get(key, getlink=True)).__name__ == "HardLink" else None
    if dataset is None or not hasattr(dataset, "external") or dataset.external or dataset.is_virtual:
        raise ValueError(f"{_VARIABLES}/{key}: not an array in this file, expected one as Keras writes it")
    array = np.array(dataset[()])
    is_bfloat16 = dataset.attrs.get("dtype") == "bfloat16"  # which HDF5 does not have: raw bytes
    return bfloat16_to_float32(array.view(np.uint16)) if is_bfloat16 else array


def _index(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"weights: key {key!r}, expected '0', '1', ...")
    return int(key)


def _listed(weights: Mapping[str, Any] | Iterable[Any]) -> list[Any]:
    if not isinstance(weights, Mapping):
        return check_list("weights", weights)
    keys = sorted(map(str, weights), key=_index)
    if keys != [str(i) for i in range(len(keys))]:
        raise ValueError(f"weights: keys {keys}, expected '0', '1', ... without a gap")
    return [weights[key] for key in keys]


def _has_constant_rate(optimizer: Adam) -> bool:
    return not callable(parts_of(optimizer).options.numbers["learning_rate"])


def _layout(optimizer: Adam, count: int) -> list[str]:
    """What each of Keras's variables is."""
    return [
        "iteration",
        *(["learning_rate"] if _has_constant_rate(optimizer) else []),
        *(["average"] * count if "average" in parts_of(optimizer).options.slot_names else []),
        *["m", "v"] * count,
        *(["vhat"] * count if optimizer.amsgrad else []),
    ]


def _another_number(optimizer: Adam, found: int, layout: list[str], count: int) -> str:
    parts = {part: layout.count(part) for part in layout}
    listed = ", ".join(f"{number} {part}" for part, number in parts.items())
    hint = ""
    if found == len(layout) + count:
        hint = (
            f"; if the other {count} are gradient accumulators, which cannot be imported, finish the accumulation "
            "cycle, remove them, and divide the iteration by gradient_accumulation_steps"
        )
    rate = "a number" if _has_constant_rate(optimizer) else "a schedule or callable"
    return (
        f"weights: {found} arrays, expected {len(layout)} ({listed}) for {count} variables, learning_rate {rate}, "
        f"amsgrad={optimizer.amsgrad}, use_ema={'average' in parts}: the options of the Keras optimizer{hint}"
    )
