"""One Adam step in plain NumPy float64: the definition of correct, written to be read beside the paper."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastadam._core.keywords import suggests_keywords

__all__ = ["adam_step"]


def __dir__() -> list[str]:
    return sorted(__all__)


_Array = npt.NDArray[np.float64]


@suggests_keywords()
def adam_step(
    var: npt.ArrayLike,
    grad: npt.ArrayLike,
    m: npt.ArrayLike,
    v: npt.ArrayLike,
    vhat: npt.ArrayLike | None = None,
    *,
    step: int,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    decay: float = 0.0,
    clipvalue: float | None = None,
    grad_factor: float = 1.0,
    weight_decay: float = 0.0,
) -> tuple[_Array, _Array, _Array, _Array | None]:
    """Return new float64 ``(var, m, v, vhat)``; the arguments of :func:`fastadam.adam_step`, nothing in place.

    >>> import numpy as np, fastadam
    >>> var, m, v, vhat = fastadam.reference.adam_step([1.0], [0.5], [0.0], [0.0], step=1, learning_rate=0.1)
    >>> float(var[0].round(6)), float(m[0].round(6))
    (0.900001, 0.05)
    """
    theta, g, m, v = (np.asarray(x, dtype=np.float64) for x in (var, grad, m, v))
    if clipvalue is not None:
        g = np.clip(g, -clipvalue, clipvalue)
    g = g * grad_factor
    rate = learning_rate / (1 + decay * (step - 1))
    alpha_t = rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
    m = m + (g - m) * (1 - beta_1)
    v = v + (g**2 - v) * (1 - beta_2)
    second_moment = v
    if vhat is not None:
        old = np.asarray(vhat, dtype=np.float64)
        second_moment = vhat = np.where(v > old, v, old)  # against a NaN the old maximum stays, as in TF
    theta = theta * (1 - weight_decay * rate) - m * alpha_t / (np.sqrt(second_moment) + epsilon)
    return theta, m, v, vhat
