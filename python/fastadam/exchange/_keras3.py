"""The variables of a Keras 3 Adam or AdamW, from the optimizer itself or from a file."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.common.checks import check_iterations, check_list, check_number
from fastadam._core.common.frameworks import require
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import AnyArray, Foreign, HostArray
from fastadam._core.native.gradients import bfloat16_to_float32
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.parts import parts_of
from fastadam._core.saving.file_format import path_of
from fastadam.exchange._state import assign, check_adam, copies_of_slots

if TYPE_CHECKING:
    from fastadam._core.adam import Adam
    from fastadam._core.common.types import ArrayLike, VariableLike

__all__ = ["from_keras3_variables", "read_keras3_file", "to_keras3_variables"]

_VARIABLES = "optimizer/vars"


@suggests_keywords()
def to_keras3_variables(optimizer: Adam, variables: Iterable[VariableLike]) -> dict[str, HostArray]:
    """The dict that ``save_own_variables`` of a Keras 3 Adam or AdamW stores, for its ``load_own_variables``.

    The keys "0", "1", ... hold: iteration; the learning rate, unless it is a schedule or a callable; with ``use_ema``
    all averages; m and v of each variable in turn; with ``amsgrad`` all vhat. The dict holds no other hyperparameter,
    and Keras keeps the learning rate in float32. The Keras optimizer must be built and have the same options: it
    only warns and loads nothing if the dict has another length.

    Args:
        optimizer: The optimizer, which is not changed.
        variables: Its variables, in the order in which the Keras optimizer was built (``model.trainable_variables``).

    Raises:
        ValueError: A variable does not have these slots; the optimizer uses ``decay``, which Keras 3 does not have; it
            has made more steps than Keras's counter can hold.

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
        raise ValueError(f"decay: {optimizer.decay}, expected 0: Keras 3 does not have it; use a schedule")
    if optimizer.iterations >= 2**31:
        raise ValueError(f"iterations: {optimizer.iterations}, expected less than 2**31, which Keras's int32 holds")
    slots = copies_of_slots(optimizer, variables, parts_of(optimizer).options.state_format.names)
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

    The arrays are not labelled. Make the optimizer with the options of the Keras optimizer: a number as
    ``learning_rate`` if it has one, a schedule or callable if it has one, ``amsgrad``, ``use_ema``, the betas,
    ``epsilon`` (the same convention) and ``weight_decay``. The steps that follow agree within rounding: Keras
    multiplies by ``1 - beta`` computed in float64, fastadam and TensorFlow by a difference of float32 numbers.

    Gradient accumulators are refused. If the Keras optimizer has ``gradient_accumulation_steps=k``, finish the
    accumulation cycle, remove the accumulators from the list (one for each variable, before the first m), and divide
    the iteration, which counts calls, by k. Schedules and averages advance with every call in Keras and with every step
    here.

    Args:
        optimizer: The optimizer to change.
        weights: The dict of ``save_own_variables`` or :func:`read_keras3_file`, or a list of the values of
            ``optimizer.variables``.
        variables: The variables, in the order in which the Keras optimizer was built (``model.trainable_variables``).

    Raises:
        TypeError: ``optimizer`` is not an Adam.
        ValueError: The number of arrays does not fit these options, because of gradient accumulators for example; a
            shape is wrong. Nothing is changed.

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
    targets, arrays = check_list("variables", variables), _listed(weights)
    layout = _layout(optimizer, len(targets))
    if len(arrays) != len(layout):
        raise ValueError(_wrong_number(optimizer, len(arrays), layout, len(targets)))
    parts: dict[str, list[AnyArray]] = {part: [] for part in layout}
    for part, array in zip(layout, arrays, strict=True):
        parts[part].append(array)
    iterations = check_iterations("weights[0]", parts.pop("iteration")[0])
    hyper = {"learning_rate": check_number("weights[1]", rate[0])} if (rate := parts.pop("learning_rate", None)) else {}
    slots = {
        name: parts.get(name, []) for name in parts_of(optimizer).options.state_format.names if name != ACCUMULATOR
    }
    assign(optimizer, targets, iterations, slots, hyper)


@suggests_keywords()
def read_keras3_file(path: str | os.PathLike[str]) -> dict[str, HostArray]:
    """Read the optimizer's variables from a ``.weights.h5`` or ``.keras`` file, for :func:`from_keras3_variables`.

    bfloat16 variables become float32. Code in the file is never run.

    Args:
        path: A file written by ``model.save_weights`` or ``model.save``.

    Returns:
        The arrays under the keys "0", "1", ...

    Raises:
        ImportError: h5py is not installed.
        OSError: The file cannot be read.
        ValueError: The file does not hold an optimizer, or links to another file.

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
    name = path_of(path)
    h5py = require("h5py", "reading a weights file of Keras")
    with h5py.File(_weights_of(name), "r") as file:
        group = file
        for part in _VARIABLES.split("/"):
            link = group.get(part, getlink=True) if hasattr(group, "get") else None
            if link is None:
                raise ValueError(f"{name}: no group '{_VARIABLES}', expected a file of a model with a built optimizer")
            if type(link).__name__ != "HardLink":  # HDF5 would open the file that it names
                to = getattr(link, "filename", link.path)
                raise ValueError(f"{name}: '{_VARIABLES}' is a link to {to}, expected it in this file")
            group = group[part]
        return {key: _read(group, key) for key in sorted(group, key=_index)}


def _weights_of(name: str) -> str | io.BytesIO:
    if not zipfile.is_zipfile(name):
        return name
    with zipfile.ZipFile(name) as archive:
        if "model.weights.h5" not in archive.namelist():
            raise ValueError(f"{name}: an archive without 'model.weights.h5', expected a .keras file")
        return io.BytesIO(archive.read("model.weights.h5"))


def _read(group: Foreign, key: str) -> HostArray:
    dataset = group[key] if type(group.get(key, getlink=True)).__name__ == "HardLink" else None
    if dataset is None or not hasattr(dataset, "external") or dataset.external or dataset.is_virtual:
        raise ValueError(f"{_VARIABLES}/{key}: not an array in this file, expected one as Keras writes it")
    array = np.array(dataset[()])
    is_bfloat16 = dataset.attrs.get("dtype") == "bfloat16"  # raw bytes, since HDF5 does not have this type
    return bfloat16_to_float32(array.view(np.uint16)) if is_bfloat16 else array


def _index(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"weights: key {key!r}, expected '0', '1', ...")
    return int(key)


def _listed(weights: Mapping[str, ArrayLike] | Iterable[ArrayLike]) -> list[AnyArray]:
    if not isinstance(weights, Mapping):
        return check_list("weights", weights)
    keys = sorted(map(str, weights), key=_index)
    if keys != [str(i) for i in range(len(keys))]:
        raise ValueError(f"weights: keys {keys}, expected '0', '1', ... without gaps")
    return [weights[key] for key in keys]


def _has_constant_rate(optimizer: Adam) -> bool:
    return not callable(parts_of(optimizer).options.numbers["learning_rate"])


def _layout(optimizer: Adam, count: int) -> list[str]:
    """The kind of each of Keras's variables, in order."""
    return [
        "iteration",
        *(["learning_rate"] if _has_constant_rate(optimizer) else []),
        *(["average"] * count if "average" in parts_of(optimizer).options.state_format.names else []),
        *["m", "v"] * count,
        *(["vhat"] * count if optimizer.amsgrad else []),
    ]


def _wrong_number(optimizer: Adam, actual: int, layout: list[str], count: int) -> str:
    parts = {part: layout.count(part) for part in layout}
    listed = ", ".join(f"{number} {part}" for part, number in parts.items())
    hint = ""
    if actual == len(layout) + count:
        hint = (
            f"; if the other {count} are gradient accumulators, which cannot be imported, finish the accumulation "
            "cycle, remove them, and divide the iteration by gradient_accumulation_steps"
        )
    rate = "a number" if _has_constant_rate(optimizer) else "a schedule or callable"
    return (
        f"weights: {actual} arrays, expected {len(layout)} ({listed}) for {count} variables, learning_rate {rate}, "
        f"amsgrad={optimizer.amsgrad}, use_ema={'average' in parts}: the options of the Keras optimizer{hint}"
    )
