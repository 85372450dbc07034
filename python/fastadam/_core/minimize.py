"""``minimize``, ``get_gradients`` and ``get_updates`` of tf.keras, with gradients from a provider of your choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam._core.autodiff import Loss, check_provider, installed, run_and_differentiate
from fastadam._core.checks import check_list
from fastadam._core.gradients import as_float_array
from fastadam._core.tree import flatten
from fastadam._core.variable import Variable, reading
from fastadam._core.warning import warn

if TYPE_CHECKING:
    from fastadam._core.types import ArrayLike, Provider, VariableTree

__all__ = ["Minimizer", "set_gradient_provider"]

_default: Provider | None = None


def set_gradient_provider(provider: Provider | None) -> None:
    """Choose where ``minimize`` and ``get_gradients`` get gradients from, unless their ``gradient`` says otherwise.

    Args:
        provider: "autograd" (HIPS autograd), "jax" or "torch"; or a function ``gradient(loss, variables)`` that
            returns a list with a gradient or None for each variable; None for no default, as at the start.

    Raises:
        TypeError: Neither a name nor a function.
        ValueError: An unknown name.
        ModuleNotFoundError: A provider that is not installed; the message says which are.

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
    """Steps on a loss instead of gradients, for a class that has ``apply_gradients``."""

    apply_gradients: Callable[..., np.int64 | None]

    @property
    def _told(self) -> set[str]:
        """The warnings that have been given; each is given once."""
        raise NotImplementedError

    @property
    def _loss_scale(self) -> float | None:
        """What ``apply_gradients`` divides the gradients by: the loss is multiplied by it."""
        return None

    def _refresh(self, variable: Any, ids: Any) -> None:
        """Bring rows of a variable (None: of every one), or all for None, up to date before a loss reads them."""

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

        .. math:: g = \sum_i u_i \, \partial loss_i / \partial \theta, \quad u = grad\_loss \text{ or } 1

        The loss reads its variables by ``value`` (or uses the :class:`fastadam.Variable` itself), which inside it is
        an array of the provider, in the variable's dtype: use the functions of ``autograd.numpy``, ``jax.numpy`` or
        ``torch`` there. What the loss reads by other ways (the array a Variable was made from, ``numpy()``, a thread
        that it starts) is a constant.

        "jax" runs the loss twice in every call: first under ``jax.eval_shape``, to learn what it reads, where ``value``
        has a shape but no numbers, so that Python cannot branch on it; then for the gradient. Both runs must read the
        same variables and rows: draw batches outside of the loss. Double precision is on meanwhile if a variable is
        float64. To a function under ``jax.jit`` pass ``value`` as an argument.

        Args:
            loss: Function without arguments that returns a float array. Of more than one element the sum is meant,
                with a warning unless ``grad_loss`` is given.
            var_list: Variables: a list, a nested structure (dicts in the order of their sorted keys), a single one,
                or a function without arguments, called after the loss has run; for that, a function as ``gradient``
                runs the loss once more. Only a function as ``gradient`` can do with plain arrays.
            grad_loss: The upstream gradient, in the shape of the loss.
            name: Passed to ``apply_gradients``.
            gradient: "autograd", "jax", "torch", or a function ``gradient(loss, variables)`` that returns a list with
                a gradient or None for each variable; the default is that of :func:`fastadam.set_gradient_provider`.

        A loss scale of the optimizer is applied to the loss.

        Returns:
            What ``apply_gradients`` does: ``iterations`` after the step, None for an empty ``var_list``.

        Raises:
            TypeError: ``loss`` is no function or returned no float array; ``var_list`` holds something else than
                Variables; ``gradient`` is neither a name nor a function.
            ValueError: No provider was chosen, or an unknown one; ``grad_loss`` has another shape than the loss; the
                loss depends on none of the variables; ``var_list`` is an iterator that yields nothing.
            ModuleNotFoundError: The provider is not installed.
            Exception: Whatever the loss raises. In all cases no variable has been changed.

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
    ) -> list[Any]:
        """The gradients of a loss, not clipped; the arguments are those of :meth:`minimize`.

        Returns:
            One array for each variable, in its dtype; not to be written to, for two may be the same array.

        Raises:
            ValueError: The loss does not depend on one of the variables; and all that :meth:`minimize` raises.

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
        """:meth:`get_gradients`, then ``apply_gradients``, whose result is the only item of the list.

        >>> import fastadam
        >>> w = fastadam.Variable([1.0, -2.0])
        >>> twice = lambda loss, variables: [2 * v.value for v in variables]
        >>> [int(i) for i in fastadam.Adam().get_updates(lambda: (w.value**2).sum(), [w], gradient=twice)]
        [1]
        """
        gradients, variables = _all_gradients(self, loss, params, grad_loss, gradient, self._loss_scale)
        return [self.apply_gradients(list(zip(gradients, variables, strict=True)))]


def _all_gradients(
    optimizer: Minimizer,
    loss: Loss,
    params: Any,
    grad_loss: Any,
    gradient: Provider | None,
    scale: float | None = None,
) -> tuple[list[Any], list[Any]]:
    gradients, variables = _differentiate(optimizer, loss, params, grad_loss, gradient, "params", scale)
    for i, (found, variable) in enumerate(zip(gradients, variables, strict=True)):
        if found is None:
            name = getattr(variable, "name", None) or f"params[{i}]"
            raise ValueError(
                f"Variable {name} has `None` for gradient. Please make sure that all of your ops have "
                "a gradient defined (i.e. are differentiable), and that the loss uses it."
            )
    return gradients, variables


def _differentiate(
    optimizer: Minimizer,
    loss: Any,
    var_list: Any,
    grad_loss: Any,
    gradient: Provider | None,
    argument: str,
    scale: float | None,
) -> tuple[list[Any], list[Any]]:
    """Gradients of the loss times ``scale``, and variables, flat."""
    if not callable(loss):
        raise TypeError(f"loss: {type(loss).__name__}, expected a function without arguments")
    chosen = _chosen(gradient)
    if not isinstance(chosen, str):
        if scale is not None:
            raise ValueError(
                "gradient: a function, which a loss scale cannot reach; expected the name of a provider, or gradients "
                "of scale_loss(loss) given to apply_gradients"
            )
        optimizer._refresh(None, None)
        return _from_function(chosen, loss, var_list, grad_loss, argument)
    upstream = None if grad_loss is None else as_float_array(grad_loss, "grad_loss")
    targets = _Targets(var_list, argument)
    shapes: list[tuple[int, ...]] = []

    def scaled() -> Any:
        value = loss()
        shapes.append(tuple(getattr(value, "shape", ())))
        return value if scale is None else value * scale

    gradients = run_and_differentiate(chosen, scaled, targets.known, targets.resolve, upstream, optimizer._refresh)
    if upstream is None and math.prod(shapes[-1]) > 1 and "loss" not in optimizer._told:
        optimizer._told.add("loss")
        warn(
            f"loss: returned an array of shape {shapes[-1]}, whose sum is minimized, as in "
            "TensorFlow; return .sum() or .mean() of it, or give grad_loss"
        )
    variables = targets.resolve()
    if variables and all(found is None for found in gradients):
        names = [variable.name or f"{argument}[{i}]" for i, variable in enumerate(variables)]
        raise ValueError(
            f"No gradients provided for any variable: {names}. The loss depends on none of them; inside it read a "
            "Variable by its `value`, not the array that it was made from, which is a constant"
        )
    return gradients, list(variables)


class _Targets:
    """The Variables of ``var_list``; a function is called once, after the loss has run."""

    def __init__(self, var_list: Any, argument: str) -> None:
        self._var_list, self._argument = var_list, argument
        self.known = None if callable(var_list) else self._flat(var_list)

    def resolve(self) -> list[Variable]:
        if self.known is None:
            self.known = self._flat(self._var_list())
        return self.known

    def _flat(self, tree: Any) -> list[Variable]:
        leaves = _leaves(tree, self._argument)
        for label, leaf in leaves:
            if not isinstance(leaf, Variable):
                raise TypeError(
                    f"{label}: {type(leaf).__name__}, expected a fastadam.Variable: a provider cannot trace other "
                    "arrays; wrap it, fastadam.Variable(array) shares its memory, and read `value` in the loss"
                )
        return [leaf for _, leaf in leaves]


def _leaves(tree: Any, argument: str) -> list[tuple[str, Any]]:
    return list(flatten(check_list(argument, tree) if isinstance(tree, Iterator) else tree, argument))


def _from_function(
    function: Callable[..., Any], loss: Loss, var_list: Any, grad_loss: Any, argument: str
) -> tuple[list[Any], list[Any]]:
    if grad_loss is not None:
        raise ValueError("grad_loss: given with a function as `gradient`, which has to multiply by it itself")
    with reading(None):  # in a loss that is being traced, too, the function gets the arrays themselves
        if callable(var_list):
            loss()
            var_list = var_list()
        variables = [leaf for _, leaf in _leaves(var_list, argument)]
        gradients = function(loss, list(variables))
    if not isinstance(gradients, (list, tuple)):
        raise TypeError(f"gradient: returned {type(gradients).__name__}, expected a list with one for each variable")
    if len(gradients) != len(variables):
        raise ValueError(f"gradient: returned {len(gradients)} gradients, expected {len(variables)}")
    return list(gradients), variables


def _chosen(gradient: Provider | None) -> Provider:
    if gradient is not None:
        return _check_gradient(gradient, "gradient")
    if _default is None:
        raise ValueError(
            "gradient: None, expected where to get gradients from: `gradient=` or fastadam.set_gradient_provider with "
            f"'autograd', 'jax', 'torch' or a function gradient(loss, variables); {installed()}"
        )
    return _check_gradient(_default, "gradient")


def _check_gradient(gradient: Any, label: str) -> Provider:
    if isinstance(gradient, str):
        check_provider(gradient, label)
    elif not callable(gradient):
        raise TypeError(f"{label}: {type(gradient).__name__}, expected the name of a provider or a function")
    return gradient  # type: ignore[no-any-return]
