"""Gradients of a loss over Variables by HIPS autograd, JAX or PyTorch, whichever is named; none is imported before.

Each provider is a :class:`Tape`: while the loss runs it answers ``Variable.value`` with an array of its library.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam.variable import Variable, reading

__all__ = ["PROVIDERS", "Loss", "Tape", "check_provider", "installed", "run_and_differentiate"]

Loss = Callable[[], Any]
Resolve = Callable[[], Sequence[Variable]]


class Tape(abc.ABC):
    """One run of a loss.

    Args:
        variables: What to differentiate with respect to; None means every Variable that the loss reads.
    """

    def __init__(self, variables: Sequence[Variable] | None) -> None:
        self._wanted = None if variables is None else {id(variable) for variable in variables}
        self._seen: dict[int, tuple[Variable, Any]] = {}  # holds the variables: the id of a freed one comes again

    def read(self, variable: Variable) -> Any:
        """The library's array for this variable, the same in the whole run."""
        if id(variable) not in self._seen:
            wanted = self._wanted is None or id(variable) in self._wanted
            make = self.leaf if wanted else self.constant
            self._seen[id(variable)] = (variable, make(variable))
        return self._seen[id(variable)][1]

    def leaf_of(self, variable: Variable) -> Any:
        """The array that the loss got for this variable; None if it never asked."""
        return self._seen.get(id(variable), (None, None))[1]

    def run(self, loss: Loss) -> Any:
        """The value of the loss; of a Variable its array."""
        with reading(self):
            result = loss()
            return result.value if isinstance(result, Variable) else result

    @abc.abstractmethod
    def leaf(self, variable: Variable) -> Any:
        """An array to differentiate with respect to."""

    @abc.abstractmethod
    def constant(self, variable: Variable) -> Any:
        """An array without gradient."""

    @abc.abstractmethod
    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        """Run the loss, ask ``resolve`` for the variables; an array, or None where the loss does not depend on it."""


class AutogradTape(Tape):
    """HIPS autograd: every variable is a root of its own, made when the loss first reads it."""

    def __init__(self, variables: Sequence[Variable] | None) -> None:
        super().__init__(variables)
        importlib.import_module("autograd.numpy")
        self._core = importlib.import_module("autograd.core")
        self._tracer = importlib.import_module("autograd.tracer")
        self._tracer.Box.types.update({Variable, *map(type, variables or ())})
        # Above the traces around the loss, below those inside it. autograd's stack, which is not safe to share between
        # threads, is left as it is.
        self._trace = self._tracer.trace_stack.top + 0.5

    def leaf(self, variable: Variable) -> Any:
        return self._tracer.new_box(variable._value, self._trace, self._core.VJPNode.new_root())

    def constant(self, variable: Variable) -> Any:
        return variable._value

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        result, variables = self.run(loss), resolve()
        if not self._tracer.isbox(result) or result._trace != self._trace:
            _check_loss(result, upstream)
            return [None] * len(variables)
        if self._tracer.isbox(result._value):
            raise TypeError("loss: depends on an array that another run of autograd traces, expected only Variables")
        _check_loss(result._value, upstream)
        found = self._backward(result._node, _seed(upstream, result._value))
        leaves = [self.leaf_of(variable) for variable in variables]
        return [None if leaf is None else found.get(leaf._node) for leaf in leaves]

    def _backward(self, end: Any, upstream: Any) -> dict[Any, Any]:
        """The backward pass of autograd, but with the gradients of all roots."""
        waiting = {end: (upstream, False)}
        roots = {}
        for node in importlib.import_module("autograd.util").toposort(end):
            gradient, _ = waiting.pop(node)
            if not node.parents:
                roots[node] = gradient
            for parent, part in zip(node.parents, node.vjp(gradient), strict=False):
                waiting[parent] = self._core.add_outgrads(waiting.get(parent), part)
        return roots


class TorchTape(Tape):
    """PyTorch on the CPU: tensors that share the memory of the variables."""

    def __init__(self, variables: Sequence[Variable] | None) -> None:
        super().__init__(variables)
        self._torch = importlib.import_module("torch")

    def run(self, loss: Loss) -> Any:
        with self._torch.enable_grad():
            return super().run(loss)

    def leaf(self, variable: Variable) -> Any:
        return self.constant(variable).requires_grad_()

    def constant(self, variable: Variable) -> Any:
        array = variable._value
        if array.dtype.name == "bfloat16":  # NumPy's bfloat16 is unknown to PyTorch; its bits are not
            return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        result, variables = self.run(loss), resolve()
        _check_loss(result, upstream)
        leaves = [self.leaf_of(variable) for variable in variables]
        known = [i for i, leaf in enumerate(leaves) if leaf is not None]
        found: list[Any] = [None] * len(leaves)
        if known and getattr(result, "requires_grad", False):
            seed = self._torch.from_numpy(_seed(upstream, np.empty(result.shape))).to(result.dtype)
            inputs = [leaves[i] for i in known]
            parts = self._torch.autograd.grad(result, inputs, seed, allow_unused=True)
            for i, part in zip(known, parts, strict=True):
                found[i] = None if part is None else self._to_numpy(part, variables[i])
        return found

    def _to_numpy(self, tensor: Any, variable: Variable) -> Any:
        dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        if dense.dtype == self._torch.bfloat16:
            return dense.view(self._torch.int16).numpy().view(variable.dtype)
        return dense.numpy()


class JaxTape(Tape):
    """JAX: the loss is traced as a function of the variables, which must be known before it runs."""

    def __init__(self, variables: Sequence[Variable] | None) -> None:
        super().__init__(variables or ())
        self._jax = importlib.import_module("jax")
        self._numpy = importlib.import_module("jax.numpy")
        self._tracers: dict[int, Any] = {}
        self._known = variables

    def leaf(self, variable: Variable) -> Any:
        return self._tracers[id(variable)]

    def constant(self, variable: Variable) -> Any:
        # A copy: JAX may share NumPy's memory and compute later, when the variable has been updated.
        return self._numpy.array(variable._value, copy=True)

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        if self._known is None:
            self.run(loss)
            return JaxTape(resolve()).differentiate(loss, resolve, upstream)
        distinct = list({id(variable): variable for variable in self._known}.values())
        with self._precision(distinct):
            parts = self._pull_back(loss, distinct, upstream)
            found = {id(variable): part for variable, part in zip(distinct, parts, strict=True)}
            return [found[id(variable)] for variable in self._known]

    def _pull_back(self, loss: Loss, variables: Sequence[Variable], upstream: Any) -> list[Any]:
        depends = False

        def traced(arrays: list[Any]) -> Any:
            nonlocal depends
            self._tracers = {id(variable): array for variable, array in zip(variables, arrays, strict=True)}
            result = self.run(loss)
            _check_loss(result, upstream)
            depends = isinstance(result, self._jax.core.Tracer)
            return self._numpy.asarray(result)

        result, pull_back = self._jax.vjp(traced, [self.constant(variable) for variable in variables])
        if not depends:
            return [None] * len(variables)
        seed = self._numpy.asarray(_seed(upstream, np.empty(result.shape)), result.dtype)
        (parts,) = pull_back(seed)
        read = [self.leaf_of(variable) is not None for variable in variables]
        return [np.asarray(part) if was_read else None for part, was_read in zip(parts, read, strict=True)]

    def _precision(self, variables: Sequence[Variable]) -> contextlib.AbstractContextManager[Any]:
        """JAX computes in double only where it is allowed to; here, for double variables."""
        if all(variable.dtype != np.float64 for variable in variables):
            return contextlib.nullcontext()
        if hasattr(self._jax, "enable_x64"):
            return self._jax.enable_x64(True)  # type: ignore[no-any-return]
        return importlib.import_module("jax.experimental").enable_x64()  # type: ignore[no-any-return]


PROVIDERS: dict[str, type[Tape]] = {"autograd": AutogradTape, "jax": JaxTape, "torch": TorchTape}


def installed() -> str:
    """The providers that are installed, in words."""
    names = [repr(name) for name in PROVIDERS if importlib.util.find_spec(name) is not None]
    return f"installed here: {', '.join(names)}" if names else f"none of {', '.join(PROVIDERS)} is installed here"


def check_provider(name: str, label: str) -> None:
    """Refuse a name that is no provider, and a provider that is not installed."""
    if name not in PROVIDERS:
        raise ValueError(f"{label}: {name!r}, expected one of {', '.join(map(repr, PROVIDERS))}; {installed()}")
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{label}: {name!r} is not installed, `pip install 'fastadam[{name}]'` does it; {installed()}", name=name
        )


def run_and_differentiate(
    provider: str, loss: Loss, variables: Sequence[Variable] | None, resolve: Resolve, upstream: Any
) -> list[Any]:
    """The gradients of a loss, each in the dtype of its variable, None where the loss does not depend on it.

    Args:
        provider: A name of ``PROVIDERS``.
        loss: Function without arguments.
        variables: The variables, or None if they are known only after the loss has run.
        resolve: The variables, asked after the loss has run.
        upstream: The gradient with respect to the value of the loss; None means ones.

    Raises:
        TypeError: The loss returned no float array.
        ValueError: ``upstream`` has not the shape of the loss.
    """
    found = PROVIDERS[provider](variables).differentiate(loss, resolve, upstream)
    return [
        None if part is None else np.asarray(part, variable.dtype)
        for part, variable in zip(found, resolve(), strict=True)
    ]


def _check_loss(result: Any, upstream: Any) -> None:
    dtype = getattr(result, "dtype", None)
    is_float = isinstance(result, float) if dtype is None else "float" in str(dtype)
    if not is_float:
        what = type(result).__name__ if dtype is None else f"{type(result).__name__} of dtype {dtype}"
        raise TypeError(f"loss: returned {what}, expected a float array of the provider of gradients")
    shape = tuple(np.shape(result))
    if upstream is not None and np.shape(upstream) != shape:
        raise ValueError(f"grad_loss: shape {np.shape(upstream)}, expected {shape} like the loss")


def _seed(upstream: Any, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What the gradient starts from, a new array: ones, or the caller's ``grad_loss``."""
    return np.ones(np.shape(like), like.dtype) if upstream is None else np.array(upstream, like.dtype)
