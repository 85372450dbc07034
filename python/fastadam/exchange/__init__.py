"""Convert the state of the Adam optimizers of Keras, PyTorch and optax to and from :class:`fastadam.Adam`.

The 8-bit states of bitsandbytes and torchao become state dicts of PyTorch, which :mod:`fastadam.torch` loads.
All of the state is checked before anything is written: a call that raises has changed nothing.
"""

from __future__ import annotations

from fastadam._core.common.public import publish
from fastadam.exchange._bitsandbytes import from_bitsandbytes, to_bitsandbytes
from fastadam.exchange._keras import from_keras_weights, to_keras_weights
from fastadam.exchange._keras3 import from_keras3_variables, read_keras3_file, to_keras3_variables
from fastadam.exchange._optax import from_optax_state, to_optax_state
from fastadam.exchange._torch import from_torch_state_dict, to_torch_state_dict
from fastadam.exchange._torchao import from_torchao

__all__ = [
    "from_bitsandbytes",
    "from_keras3_variables",
    "from_keras_weights",
    "from_optax_state",
    "from_torch_state_dict",
    "from_torchao",
    "read_keras3_file",
    "to_bitsandbytes",
    "to_keras3_variables",
    "to_keras_weights",
    "to_optax_state",
    "to_torch_state_dict",
]

publish(globals())


def __dir__() -> list[str]:
    return sorted(__all__)
