"""fastadam: the Adam optimizer as a native library, in place on NumPy buffers, with TensorFlow's bits.

>>> import numpy as np, fastadam
>>> w = np.zeros(3, np.float32)
>>> opt = fastadam.Adam(learning_rate=0.01)
>>> step = opt.apply_gradients([(np.ones(3, np.float32), w)])
"""

from __future__ import annotations

from fastadam import cuda, exchange, info, reference, schedules
from fastadam._backend import _cpu
from fastadam.clipping import global_norm
from fastadam.info import isas, set_isa, set_num_threads, show_config
from fastadam.loss_scale import LossScaleOptimizer
from fastadam.minimize import set_gradient_provider
from fastadam.ops import adam_step
from fastadam.optimizer import Adam, AdamW
from fastadam.slices import IndexedSlices
from fastadam.variable import Variable

__version__: str = _cpu.__version__

__all__ = [
    "Adam",
    "AdamW",
    "IndexedSlices",
    "LossScaleOptimizer",
    "Variable",
    "__version__",
    "adam_step",
    "cuda",
    "exchange",
    "global_norm",
    "info",
    "isas",
    "reference",
    "schedules",
    "set_gradient_provider",
    "set_isa",
    "set_num_threads",
    "show_config",
]
