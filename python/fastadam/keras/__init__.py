"""Keras 3 optimizers whose update is one native call: ``model.compile(optimizer=fastadam.keras.Adam(1e-3))``.

Not imported by ``import fastadam``. Clipping, decoupled weight decay, averages (``use_ema``), accumulated gradients,
loss scale, constraints, schedules and saving are Keras's own; what is replaced is the update of variables and moments.
"""

from __future__ import annotations

from fastadam._core.common.frameworks import missing
from fastadam._core.common.public import publish
from fastadam.keras._backend import check_choice, check_version

try:
    check_choice()
    import keras as _keras

    check_version(_keras)
    from fastadam.keras._optimizer import Adam, AdamW
except ModuleNotFoundError as _error:
    raise missing("fastadam.keras", _error) from None

__all__ = ["Adam", "AdamW"]

publish(globals())


def __dir__() -> list[str]:
    return sorted(__all__)
