"""One Adam step in plain NumPy float64: the definition of a correct step, to be read beside the paper."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastadam._core.common.checks import as_array, check_number, is_real
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import HostArray

__all__ = ["adam_step"]


def __dir__() -> list[str]:
    return sorted(__all__)


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
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    r"""One Adam step in float64, which returns new arrays ``(var, m, v, vhat)`` and changes nothing in place.

    .. math::
        \alpha_t = \eta_t \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}, \quad
        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \leftarrow \theta (1 - \lambda \eta_t) - \frac{\alpha_t m}{\sqrt{v} + \hat\epsilon}

    Raises:
        TypeError: An argument is not a number or an array of real numbers.
        ValueError: A number is not finite, or a shape is not that of ``var``.

    The arguments are the same as for :func:`fastadam.adam_step`. With ``vhat``, the maximum of the second moments takes
    the place of v in the update (AMSGrad).

    Source: Kingma and Ba, "Adam" (arXiv:1412.6980), section 2, last paragraph.

    >>> import numpy as np, fastadam
    >>> var, m, v, vhat = fastadam.reference.adam_step([1.0], [0.5], [0.0], [0.0], step=1, learning_rate=0.1)
    >>> float(var[0].round(6)), float(m[0].round(6))
    (0.900001, 0.05)
    """
    theta = _float64("var", var)
    g, m, v = (_float64(name, x, theta) for name, x in (("grad", grad), ("m", m), ("v", v)))
    learning_rate, decay = check_number("learning_rate", learning_rate), check_number("decay", decay)
    beta_1, beta_2 = check_number("beta_1", beta_1), check_number("beta_2", beta_2)
    epsilon, weight_decay = check_number("epsilon", epsilon), check_number("weight_decay", weight_decay)
    t, factor = check_number("step", step), check_number("grad_factor", grad_factor)
    if clipvalue is not None:
        bound = check_number("clipvalue", clipvalue)
        g = np.clip(g, -bound, bound)
    g = g * factor
    rate = learning_rate / (1 + decay * (t - 1))
    alpha_t = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
    m = m + (g - m) * (1 - beta_1)
    v = v + (g**2 - v) * (1 - beta_2)
    second_moment = v
    if vhat is not None:
        old = _float64("vhat", vhat, theta)
        second_moment = vhat = np.where(v > old, v, old)  # where v is NaN, the old maximum stays, as in TensorFlow
    theta = theta * (1 - weight_decay * rate) - m * alpha_t / (np.sqrt(second_moment) + epsilon)
    return theta, m, v, vhat


def _float64(name: str, values: npt.ArrayLike, like: HostArray | None = None) -> npt.NDArray[np.float64]:
    array = as_array(name, values, "an array of numbers")
    if not is_real(array.dtype):
        raise TypeError(f"{name}: dtype {array.dtype}, expected real numbers")
    if like is not None and array.ndim and array.shape != like.shape:
        raise ValueError(f"{name}: shape {array.shape}, expected {like.shape} like var")
    return np.asarray(array, dtype=np.float64)
