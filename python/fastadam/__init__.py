"""fastadam: the Adam optimizer as a native library that updates arrays in place, with TensorFlow's bits.

The adapters `fastadam.torch`, `fastadam.jax` and `fastadam.keras` load when you first use them.

In signatures, ``Array`` is an array of any library, ``VariableLike`` a :class:`Variable` or a writable array,
``Gradient`` an array, nested list, :class:`IndexedSlices` or sparse matrix of SciPy, ``Hyperparameter`` a number or a
function without arguments, ``LearningRate`` one of these or a schedule, and ``Tree`` nested lists, tuples and dicts.

>>> import numpy as np, fastadam
>>> w = np.zeros(3, np.float32)
>>> opt = fastadam.Adam(learning_rate=0.01)
>>> step = opt.apply_gradients([(np.ones(3, np.float32), w)])
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import fastadam._core.native.backend as _backend  # first: it refuses where NumPy would only warn
from fastadam import cuda, exchange, reference, schedules
from fastadam._core.adam import Adam
from fastadam._core.adamw import AdamW
from fastadam._core.common.frameworks import can_load
from fastadam._core.common.public import publish
from fastadam._core.common.telemetry import Telemetry
from fastadam._core.functional import adam_step
from fastadam._core.loss_scale import LossScaleOptimizer
from fastadam._core.machine import current_isa, get_num_threads, isas, set_isa, set_num_threads, show_config
from fastadam._core.memory import MemoryRow, MemoryTable, memory
from fastadam._core.minimize import set_gradient_provider
from fastadam._core.native.slices import IndexedSlices
from fastadam._core.native.variable import Variable
from fastadam._core.norm import global_norm
from fastadam._core.saving.merging import merge_deltas

if TYPE_CHECKING:
    from fastadam import jax as jax
    from fastadam import keras as keras
    from fastadam import torch as torch
else:  # not for type checkers, for which every name would exist

    def __getattr__(name: str) -> ModuleType:
        """Import an adapter, with its framework, when it is first used."""
        if name in ("jax", "keras", "torch"):
            return importlib.import_module(f"fastadam.{name}")
        raise AttributeError(f"module 'fastadam' has no attribute {name!r}")


__version__ = _backend.__version__

__all__ = [
    "Adam",
    "AdamW",
    "IndexedSlices",
    "LossScaleOptimizer",
    "MemoryRow",
    "MemoryTable",
    "Telemetry",
    "Variable",
    "__version__",
    "adam_step",
    "cuda",
    "current_isa",
    "exchange",
    "get_num_threads",
    "global_norm",
    "isas",
    "memory",
    "merge_deltas",
    "reference",
    "schedules",
    "set_gradient_provider",
    "set_isa",
    "set_num_threads",
    "show_config",
]

publish(globals())


def __dir__() -> list[str]:
    """The public names, and the adapters that are loaded or can be."""
    return sorted([*__all__, *(name for name in ("jax", "keras", "torch") if can_load(name))])
