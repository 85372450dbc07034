"""``fastadam.adam_step``: one step for people who keep their own m and v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastadam._core.common.checks import (
    check_beta,
    check_bool,
    check_clip,
    check_count,
    check_epsilon,
    check_non_negative,
    check_number,
    check_one_norm,
)
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.native.buffers import buffers_of
from fastadam._core.native.gpu import cuda_module
from fastadam._core.native.plan import Plan, StepHyper
from fastadam._core.native.slices import DEFERRED, check_sparse_update
from fastadam._core.native.variable import unwrap

if TYPE_CHECKING:
    from fastadam._core.common.types import Array, Gradient, VariableLike

__all__ = ["adam_step"]


@suggests_keywords()
def adam_step(
    vars: VariableLike | Sequence[VariableLike],  # noqa: A002  the public name
    grads: Gradient | Sequence[Gradient],
    m: Array | Sequence[Array],
    v: Array | Sequence[Array],
    vhat: Array | Sequence[Array] | None = None,
    *,
    step: int,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float | None = 1e-7,
    decay: float = 0.0,
    clipvalue: float | None = None,
    clipnorm: float | None = None,
    global_clipnorm: float | None = None,
    grad_factor: float | Sequence[float] | None = None,
    weight_decay: float = 0.0,
    sparse_update: Literal["dense", "lazy"] = "dense",
    copies: Array | Sequence[Array | None] | None = None,
    zero_grads: bool = False,
) -> None:
    r"""One Adam step in place on arrays that the caller owns; AMSGrad if ``vhat`` is given.

    .. math::
        \alpha_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t), \quad
        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \mathrel{-}= m \alpha_t / (\sqrt{v} + \hat\epsilon)

    Epsilon is TensorFlow's: added to the square root of the *uncorrected* second moment. For PyTorch's epsilon pass
    :math:`\epsilon \sqrt{1 - \beta_2^t}`.

    Args:
        vars: Writable contiguous array (float16, bfloat16, float32, float64), or a list of them; updated in place.
        grads: Gradients of the same shapes. Another float dtype or layout is converted; not modified.
        m: First moments, zeros before step 1; float32 for half variables, else the variable's dtype.
        v: Second moments, likewise.
        vhat: Maxima of the second moments, for AMSGrad.
        step: The step count t, from 1.
        learning_rate: Step size.
        beta_1: Decay rate of m, in [0, 1).
        beta_2: Decay rate of v, in [0, 1).
        epsilon: Added to the square root; None and 0 mean 1e-7, as in TF.
        decay: ``learning_rate / (1 + decay * (step - 1))`` is used.
        clipvalue: Clip the elements of the gradients to [-clipvalue, clipvalue] first.
        clipnorm: Then scale each gradient whose norm is larger down to this norm.
        global_clipnorm: Or scale all gradients down if their joint norm is larger.
        grad_factor: Multiply the clipped gradients by this number, or by one number per variable.
        weight_decay: Decoupled: the variables shrink by ``weight_decay * learning_rate`` first (AdamW).
        sparse_update: With a gradient that is an :class:`fastadam.IndexedSlices`, "dense" moves every row, as TF does;
            "lazy" only those that it touches.
        copies: For each variable None or an array of bfloat16, float16 or float32, like the variable, which must be
            float32. In the same pass it receives the new values, rounded to nearest even.
        zero_grads: Set the gradients to zero, in the same pass. They must be dense, writable, and need no conversion.

    Raises:
        TypeError: An argument of the wrong type or dtype, or a list as variable.
        ValueError: A wrong shape, layout or number, or shared memory. In both cases nothing is changed.

    Source: Kingma and Ba, "Adam" (arXiv:1412.6980), the formulation before section 2.1;
    https://www.tensorflow.org/api_docs/python/tf/keras/optimizers/Adam.

    >>> import numpy as np, fastadam
    >>> w, m, v = np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)
    >>> fastadam.adam_step(w, np.array([0.5, -0.5]), m, v, step=1, learning_rate=0.1)
    >>> w.round(6)
    array([0.900001, 2.099999])
    """
    check_one_norm(clipnorm, global_clipnorm)
    if check_sparse_update(sparse_update) in DEFERRED:
        raise ValueError(f"sparse_update: {sparse_update!r} needs an optimizer's history, expected 'dense' or 'lazy'")
    hyper = StepHyper(
        step=check_count("step", step),
        learning_rate=check_number("learning_rate", learning_rate),
        beta_1=check_beta("beta_1", beta_1),
        beta_2=check_beta("beta_2", beta_2),
        epsilon=check_epsilon(epsilon),
        decay=check_non_negative("decay", decay),
        clip_value=check_clip("clipvalue", clipvalue),
        clip_norm=check_clip("clipnorm", clipnorm),
        global_clip_norm=check_clip("global_clipnorm", global_clipnorm),
        weight_decay=check_non_negative("weight_decay", weight_decay),
        zero_gradients=check_bool("zero_grads", zero_grads),
    )
    variables = list(vars) if isinstance(vars, (list, tuple)) else [vars]
    gradients = _as_list(grads)
    slots = {"m": _as_list(m), "v": _as_list(v)} | ({} if vhat is None else {"vhat": _as_list(vhat)})
    if not isinstance(vars, (list, tuple)):
        gradients = [grads]  # a list given for a single variable is its gradient
    positions = list(range(len(variables)))
    factors = _check_factors(grad_factor, len(variables))
    if not variables and not any((gradients, *slots.values())):
        return
    buffers = buffers_of(variables, positions)
    on_gpu = bool(buffers) and buffers[0].device >= 0
    context = cuda_module().Context(buffers[0].device) if on_gpu else None
    decays = [weight_decay != 0] * len(variables)
    receivers = [] if copies is None else _as_list(copies)
    plan = Plan(buffers, slots, decays=decays, lazy=sparse_update == "lazy", copies=receivers, context=context)
    plan.step(gradients, hyper, factors)
    if context is not None:
        context.wait()  # nobody else would be told
        if failure := context.take_failure():
            raise ValueError(failure[1])


def _as_list(argument: Any) -> list[Any]:
    return [unwrap(item) for item in argument] if isinstance(argument, (list, tuple)) else [unwrap(argument)]


def _check_factors(grad_factor: float | Sequence[float] | None, count: int) -> list[float]:
    if grad_factor is None:
        return []
    if not isinstance(grad_factor, (list, tuple)) and not getattr(grad_factor, "ndim", 0):
        return [check_number("grad_factor", grad_factor)] * count
    factors = [check_number(f"grad_factor[{i}]", factor) for i, factor in enumerate(list(grad_factor))]  # type: ignore[arg-type]
    if len(factors) != count:
        raise ValueError(f"grad_factor: {len(factors)} numbers, expected {count}, one for each variable")
    return factors
