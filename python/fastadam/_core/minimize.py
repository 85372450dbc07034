"""``minimize``, ``get_gradients`` and ``get_updates`` of tf.keras, with gradients from the provider that users name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.autodiff import Loss, check_provider, installed, run_and_differentiate
from fastadam._core.common.checks import check_list
from fastadam._core.common.tree import flatten
from fastadam._core.common.types import AnyArray, HostArray, Tree
from fastadam._core.common.warning import warn
from fastadam._core.native.gradients import as_float_array
from fastadam._core.native.variable import Variable, read_by

if TYPE_CHECKING:
    from fastadam._core.common.types import ArrayLike, Provider, VariableTree

__all__ = ["Minimizer", "scaled", "set_gradient_provider"]

_default: Provider | None = None


def set_gradient_provider(provider: Provider | None) -> None:
    """Set the default provider of gradients for ``minimize``, ``get_gradients`` and ``get_updates``.

    The argument ``gradient`` of these methods takes precedence.

    Args:
        provider: "autograd" (HIPS autograd), "jax" or "torch"; or a function ``gradient(loss, variables)`` that
            returns a list with a gradient or None for each variable. None, the initial setting, means no default.

    Raises:
        TypeError: ``provider`` is neither a name nor a function.
        ValueError: The name is unknown.
        ModuleNotFoundError: The provider is not installed; the message says which ones are.

    >>> import fastadam
    >>> fastadam.set_gradient_provider(lambda loss, variables: [2 * v.value for v in variables])
    >>> w = fastadam.Variable([1.0, -2.0])
    >>> step = fastadam.Adam(0.5).minimize(lambda: (w.value**2).sum(), w)
    >>> w.value.round(5)
    array([ 0.5, -1.5], dtype=float32)
    >>> fastadam.set_gradient_provider(None)
    """
    global _default
    _default = None if provider is None else _check_gradient(provider, "provider")


class Minimizer:
    """Methods that take a loss instead of gradients, for a class with ``apply_gradients``."""

    apply_gradients: Callable[..., np.int64 | None]

    @property
    def _told(self) -> set[str]:
        """The warnings that have been given; each is given once."""
        raise NotImplementedError

    @property
    def _loss_scale(self) -> float | None:
        """The loss is multiplied by this number; ``apply_gradients`` divides the gradients by it."""
        return None

    def _refresh(self, variable: Variable | None, ids: HostArray | None) -> None:
        """Bring rows up to date before a loss reads them.

        Args:
            variable: The table; None means every table.
            ids: The rows; None means all.
        """

    def minimize(
        self,
        loss: Loss,
        var_list: VariableTree,
        grad_loss: ArrayLike | None = None,
        name: str | None = None,
        *,
        gradient: Provider | None = None,
    ) -> np.int64 | None:
        r"""Make one step down the gradient of a loss.

        .. math:: g = \sum_i u_i \frac{\partial L_i}{\partial \theta}

        L is the loss; u is ``grad_loss``, by default 1.

        The loss reads ``value`` of its variables (or uses the :class:`fastadam.Variable` itself). Inside the loss this
        is an array of the provider, in the variable's dtype: use the functions of ``autograd.numpy``, ``jax.numpy`` or
        ``torch`` on it. Anything that the loss reads in other ways is a constant: the array that a Variable was made
        from, ``numpy()``, and reads in threads that the loss starts.

        "jax" runs the loss twice in every call. The first run, under ``jax.eval_shape``, finds out what the loss reads;
        there ``value`` has a shape but no numbers, so Python cannot branch on it. The second run gives the gradient.
        Both runs must read the same variables and rows: draw batches outside of the loss. JAX computes in float64
        during the call if a variable is float64. Pass ``value`` as an argument to functions under ``jax.jit``.

        Args:
            loss: Function without arguments that returns a float array. If it has more than one element, the sum is
                minimized, with a warning unless ``grad_loss`` is given. A loss scale of the optimizer is applied to it.
            var_list: Variables: a list, a nested structure (dicts in the order of their sorted keys), a single one,
                or a function without arguments, which is called after the loss has run (if ``gradient`` is a function,
                the loss runs once more for this). Plain arrays are accepted only if ``gradient`` is a function.
            grad_loss: The upstream gradient, in the shape of the loss.
            name: Passed to ``apply_gradients``.
            gradient: "autograd", "jax", "torch", or a function ``gradient(loss, variables)`` that returns a list with
                a gradient or None for each variable. The default is set by :func:`fastadam.set_gradient_provider`.

        Returns:
            The result of ``apply_gradients``: ``iterations`` after the step, None for an empty ``var_list``.

        Raises:
            TypeError: ``loss`` is not a function or did not return a float array; ``var_list`` holds something other
                than Variables; ``gradient`` is neither a name nor a function.
            ValueError: No provider is set, or its name is unknown; ``grad_loss`` does not have the shape of the loss;
                the loss depends on none of the variables; ``var_list`` is an iterator that yields nothing.
            ModuleNotFoundError: The provider is not installed.
            Exception: Anything that the loss raises. No variable has changed in any of these cases.

        Source: https://www.tensorflow.org/api_docs/python/tf/keras/optimizers/Adam, ``minimize``.

        >>> import importlib.util, fastadam
        >>> w = fastadam.Variable([1.0, -2.0], name="w")
        >>> provider = "autograd" if importlib.util.find_spec("autograd") else lambda loss, variables: [2 * w.value]
        >>> opt = fastadam.Adam(0.5)
        >>> step = opt.minimize(lambda: (w.value * w.value).sum(), [w], gradient=provider)
        >>> w.value.round(5)
        array([ 0.5, -1.5], dtype=float32)
        """
        gradients, variables = _differentiate(self, loss, var_list, grad_loss, gradient, "var_list", self._loss_scale)
        return self.apply_gradients(list(zip(gradients, variables, strict=True)), name)

    def get_gradients(
        self, loss: Loss, params: VariableTree, *, grad_loss: ArrayLike | None = None, gradient: Provider | None = None
    ) -> list[AnyArray]:
        """The gradients of a loss, without clipping. The arguments are the same as for :meth:`minimize`.

        Returns:
            One array for each variable, in its dtype. Do not write to them: two may be the same array.

        Raises:
            ValueError: The loss does not depend on one of the variables.
            Exception: All that :meth:`minimize` raises.

        >>> import fastadam
        >>> w = fastadam.Variable([1.0, -2.0])
        >>> twice = lambda loss, variables: [2 * v.value for v in variables]
        >>> fastadam.Adam().get_gradients(lambda: (w.value**2).sum(), [w], gradient=twice)
        [array([ 2., -4.], dtype=float32)]
        """
        return _all_gradients(self, loss, params, grad_loss, gradient)[0]

    def get_updates(
        self, loss: Loss, params: VariableTree, *, grad_loss: ArrayLike | None = None, gradient: Provider | None = None
    ) -> list[np.int64 | None]:
        """Call :meth:`get_gradients`, then ``apply_gradients``; the list holds the result of the latter.

        >>> import fastadam
        >>> w = fastadam.Variable([1.0, -2.0])
        >>> twice = lambda loss, variables: [2 * v.value for v in variables]
        >>> [int(i) for i in fastadam.Adam().get_updates(lambda: (w.value**2).sum(), [w], gradient=twice)]
        [1]
        """
        gradients, variables = _all_gradients(self, loss, params, grad_loss, gradient, self._loss_scale)
        return [self.apply_gradients(list(zip(gradients, variables, strict=True)))]


def scaled(loss: AnyArray, scale: float) -> AnyArray:
    """``loss * scale``; raises TypeError for what is not an array of numbers."""
    try:
        return loss * scale
    except (OverflowError, TypeError, ValueError) as error:
        kind = f"dtype {loss.dtype}" if hasattr(loss, "dtype") else type(loss).__name__
        raise TypeError(f"loss: {kind}, expected a number or an array of numbers ({error})") from error


def _all_gradients(
    optimizer: Minimizer,
    loss: Loss,
    params: Tree,
    grad_loss: ArrayLike | None,
    gradient: Provider | None,
    scale: float | None = None,
) -> tuple[list[AnyArray], list[AnyArray]]:
    gradients, variables = _differentiate(optimizer, loss, params, grad_loss, gradient, "params", scale)
    for i, (value, variable) in enumerate(zip(gradients, variables, strict=True)):
        if value is None:
            name = getattr(variable, "name", None) or f"params[{i}]"
            raise ValueError(
                f"Variable {name} has `None` for gradient. Please make sure that all of your ops have "
                "a gradient defined (i.e. are differentiable), and that the loss uses it."
            )
    return gradients, variables


def _differentiate(
    optimizer: Minimizer,
    loss: Loss,
    var_list: Tree,
    grad_loss: ArrayLike | None,
    gradient: Provider | None,
    argument: str,
    scale: float | None,
) -> tuple[list[AnyArray], list[AnyArray]]:
    """A flat list of the gradients of ``scale`` times the loss, and one of the variables."""
    if not callable(loss):
        raise TypeError(f"loss: {type(loss).__name__}, expected a function without arguments")
    provider = _provider_of(gradient)
    if not isinstance(provider, str):
        if scale is not None:
            raise ValueError(
                "gradient: a function, to which a loss scale does not apply; expected the name of a provider, or "
                "gradients of scale_loss(loss) passed to apply_gradients"
            )
        optimizer._refresh(None, None)
        return _from_function(provider, loss, var_list, grad_loss, argument)
    upstream = None if grad_loss is None else as_float_array(grad_loss, "grad_loss")
    targets = _Targets(var_list, argument)
    shapes: list[tuple[int, ...]] = []

    def scaled_loss() -> AnyArray:
        value = loss()
        shapes.append(tuple(getattr(value, "shape", ())))
        return value if scale is None else scaled(value, scale)

    gradients = run_and_differentiate(
        provider, scaled_loss, targets.flat, targets.resolve, upstream, optimizer._refresh
    )
    if upstream is None and math.prod(shapes[-1]) > 1 and "loss" not in optimizer._told:
        optimizer._told.add("loss")
        warn(
            f"loss: returned an array of shape {shapes[-1]}, whose sum is minimized, as in "
            "TensorFlow; return .sum() or .mean() of it, or give grad_loss"
        )
    variables = targets.resolve()
    if variables and all(value is None for value in gradients):
        names = [variable.name or f"{argument}[{i}]" for i, variable in enumerate(variables)]
        raise ValueError(
            f"No gradients provided for any variable: {names}. The loss depends on none of them; inside the loss read "
            "`value` of a Variable, not the array that it was made from, which is a constant"
        )
    return gradients, list(variables)


class _Targets:
    """The Variables of ``var_list``. A function is called once, after the loss has run; until then ``flat`` is None."""

    def __init__(self, var_list: Tree, argument: str) -> None:
        self._var_list, self._argument = var_list, argument
        self.flat = None if callable(var_list) else self._flatten(var_list)

    def resolve(self) -> list[Variable]:
        if self.flat is None:
            self.flat = self._flatten(self._var_list())
        return self.flat

    def _flatten(self, tree: Tree) -> list[Variable]:
        leaves = _leaves(tree, self._argument)
        for label, leaf in leaves:
            if not isinstance(leaf, Variable):
                raise TypeError(
                    f"{label}: {type(leaf).__name__}, expected a fastadam.Variable: a provider cannot trace other "
                    "arrays; wrap the array in fastadam.Variable(array), which shares its memory, and read `value` in "
                    "the loss"
                )
        return [leaf for _, leaf in leaves]


def _leaves(tree: Tree, argument: str) -> list[tuple[str, AnyArray]]:
    return list(flatten(check_list(argument, tree) if isinstance(tree, Iterator) else tree, argument))


def _from_function(
    function: Callable[..., object], loss: Loss, var_list: Tree, grad_loss: ArrayLike | None, argument: str
) -> tuple[list[AnyArray], list[AnyArray]]:
    if grad_loss is not None:
        raise ValueError("grad_loss: passed with a function as `gradient`, expected None: multiply in the function")

    def run() -> tuple[object, list[AnyArray]]:
        if callable(var_list):
            loss()
        variables = [leaf for _, leaf in _leaves(var_list() if callable(var_list) else var_list, argument)]
        return function(loss, list(variables)), variables

    gradients, variables = read_by(None, run)  # it reads plain arrays, even while an outer loss is being traced
    if not isinstance(gradients, (list, tuple)):
        raise TypeError(f"gradient: returned {type(gradients).__name__}, expected a list with one for each variable")
    if len(gradients) != len(variables):
        raise ValueError(f"gradient: returned {len(gradients)} gradients, expected {len(variables)}")
    return list(gradients), variables


def _provider_of(gradient: Provider | None) -> Provider:
    if gradient is not None:
        return _check_gradient(gradient, "gradient")
    if _default is None:
        raise ValueError(
            "gradient: None, expected where to get gradients from: `gradient=` or fastadam.set_gradient_provider with "
            f"'autograd', 'jax', 'torch' or a function gradient(loss, variables); {installed()}"
        )
    return _check_gradient(_default, "gradient")


def _check_gradient(gradient: Provider, label: str) -> Provider:
    if isinstance(gradient, str):
        check_provider(gradient, label)
    elif not callable(gradient):
        raise TypeError(f"{label}: {type(gradient).__name__}, expected the name of a provider or a function")
    return gradient
