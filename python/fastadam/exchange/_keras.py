"""The lists that ``get_weights`` of a tf.keras legacy Adam returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.common.checks import check_iterations, check_list
from fastadam._core.common.keywords import suggests_keywords
from fastadam.exchange._state import assign, check_adam, copies_of_slots, moment_names, require_no_average

if TYPE_CHECKING:
    from fastadam._core.adam import Adam
    from fastadam._core.common.types import AnyArray, ArrayLike, VariableLike

__all__ = ["from_keras_weights", "to_keras_weights"]


@suggests_keywords()
def to_keras_weights(optimizer: Adam, variables: Iterable[VariableLike]) -> list[AnyArray]:
    """The list that ``get_weights`` of a tf.keras legacy Adam would return: iterations, all m, all v, all vhat.

    The list does not hold hyperparameters.

    Args:
        optimizer: The optimizer, which is not changed.
        variables: Its variables, in the order in which TensorFlow first uses them.

    Returns:
        iterations as ``np.int64``, then copies of the slots in C order, float32 for half variables.

    Raises:
        ValueError: A variable does not have these slots; the optimizer has moving averages, which cannot be stored.

    Source: ``keras/optimizers/legacy/optimizer_v2.py`` of Keras 2.15.

    >>> import numpy as np, fastadam
    >>> w = np.ones(2, np.float32)
    >>> opt = fastadam.Adam(0.1, beta_1=0.5)
    >>> step = opt.apply_gradients([(np.ones(2, np.float32), w)])
    >>> fastadam.exchange.to_keras_weights(opt, [w])[:2]
    [np.int64(1), array([0.5, 0.5], dtype=float32)]
    """
    check_adam(optimizer)
    require_no_average(optimizer, "the list of tf.keras legacy")
    slots = copies_of_slots(optimizer, variables, moment_names(optimizer.amsgrad))
    return [optimizer.iterations, *(array for arrays in slots.values() for array in arrays)]


@suggests_keywords()
def from_keras_weights(optimizer: Adam, weights: Iterable[ArrayLike], variables: Iterable[VariableLike]) -> None:
    """Set the state of these variables from ``get_weights`` of a tf.keras legacy Adam.

    The list does not hold hyperparameters: make the optimizer with the same ones, ``amsgrad`` included. Then the
    steps that follow have TensorFlow's bits. The placeholders in a Keras 1 list are ignored.

    Args:
        optimizer: The optimizer to change.
        weights: iterations, all m, all v, all vhat.
        variables: The variables, in the order of the list.

    Raises:
        TypeError: ``optimizer`` is not an Adam.
        ValueError: The number of arrays or a shape is wrong; nothing is changed.

    Source: ``keras/optimizers/legacy/optimizer_v2.py`` of Keras 2.15.

    >>> import numpy as np, fastadam
    >>> w = np.ones(2, np.float32)
    >>> opt = fastadam.Adam(0.1)
    >>> fastadam.exchange.from_keras_weights(opt, [7, np.full(2, 0.5), np.full(2, 0.25)], [w])
    >>> int(opt.iterations), opt.get_slot(w, "v")
    (7, array([0.25, 0.25], dtype=float32))
    """
    check_adam(optimizer)
    names = moment_names(optimizer.amsgrad)
    targets, arrays = check_list("variables", variables), check_list("weights", weights)
    count = len(targets)
    if len(arrays) == 3 * count + 1 and len(names) == 2 and all(np.shape(a) == (1,) for a in arrays[2 * count + 1 :]):
        arrays = arrays[: 2 * count + 1]
    if len(arrays) != len(names) * count + 1:
        raise ValueError(f"weights: {len(arrays)} arrays, expected {len(names) * count + 1} for {count} variables")
    slots = {name: arrays[1 + i * count : 1 + (i + 1) * count] for i, name in enumerate(names)}
    assign(optimizer, targets, check_iterations("weights[0]", arrays[0]), slots, {})
