"""One Adam step in plain NumPy float64: the definition of a correct step, to be read beside the paper."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastadam._core.common.keywords import suggests_keywords

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

    The arguments are the same as for :func:`fastadam.adam_step`. With ``vhat``, the maximum of the second moments takes
    the place of v in the update (AMSGrad).

    Source: Kingma and Ba, "Adam" (arXiv:1412.6980), section 2, last paragraph.

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
        second_moment = vhat = np.where(v > old, v, old)  # where v is NaN, the old maximum stays, as in TensorFlow
    theta = theta * (1 - weight_decay * rate) - m * alpha_t / (np.sqrt(second_moment) + epsilon)
    return theta, m, v, vhat
