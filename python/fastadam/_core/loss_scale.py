"""Dynamic loss scaling, for gradients computed in float16: Keras's LossScaleOptimizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam._core import saving as serialization
from fastadam._core.adam import Adam
from fastadam._core.adamw import AdamW
from fastadam._core.common.checks import check_count, check_iterations, check_number
from fastadam._core.common.display import call_text, html_or_none, html_table, name_of, never_raises
from fastadam._core.common.frameworks import named_in_keras
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.strict import class_only, is_own, settable, unknown_attribute
from fastadam._core.minimize import Minimizer
from fastadam._core.pairs import check_pairs_list
from fastadam._core.parts import parts_of
from fastadam._core.step import Stepper

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.common.types import AnyArray, Config, Gradient, HostArray, VariableLike
    from fastadam._core.native.variable import Variable

__all__ = ["LossScaleOptimizer"]


@named_in_keras
class LossScaleOptimizer(Minimizer):
    r"""Dynamic loss scaling for an optimizer: the loss is multiplied by a scale that adapts to the gradients.

    ``apply_gradients`` divides the gradients of ``scale_loss(loss)`` by the scale. If any element of any gradient, or a
    norm that is to be clipped, is not finite, it skips the whole step, does not count it in ``iterations``, and halves
    the scale. After ``dynamic_growth_steps`` good steps in a row the scale is doubled. The scale stays within
    [1, 2**126]; in Keras 3 it can fall to 0. Gradients are checked before they are clipped, in the same pass that
    computes their norm.

    Attributes of the inner optimizer (``iterations``, ``learning_rate``, ``get_slot`` ...) can be used on this one.

    Args:
        inner_optimizer: An :class:`Adam` without a ``loss_scale_factor``.
        initial_scale: The first scale. Scaling by a power of two does not change results.
        dynamic_growth_steps: Number of good steps after which the scale is doubled.

    Raises:
        TypeError: ``inner_optimizer`` is not an Adam, or a number has the wrong type.
        ValueError: ``inner_optimizer`` has a ``loss_scale_factor``; a scale is outside [1, 2**126];
            ``dynamic_growth_steps`` is under 1.

    Source: https://keras.io/api/optimizers/loss_scale_optimizer/; Micikevicius et al., "Mixed Precision Training"
    (arXiv:1710.03740).

    >>> import numpy as np, fastadam
    >>> w = np.array([1.0, 2.0], dtype=np.float32)
    >>> opt = fastadam.LossScaleOptimizer(fastadam.Adam(0.1), initial_scale=1024.0)
    >>> int(opt.apply_gradients([(np.array([np.inf, 1.0], np.float32), w)])), opt.dynamic_scale, w.tolist()
    (0, 512.0, [1.0, 2.0])
    >>> int(opt.apply_gradients([(np.array([512.0, -512.0], np.float32), w)])), w.round(5).tolist()
    (1, [0.8999999761581421, 2.0999999046325684])
    """

    inner_optimizer: Adam
    initial_scale: float
    dynamic_scale: float
    dynamic_growth_steps: int
    step_counter: int

    @suggests_keywords("optimizer")
    def __init__(self, inner_optimizer: Adam, initial_scale: float = 2.0**15, dynamic_growth_steps: int = 2000) -> None:
        self.inner_optimizer = inner_optimizer
        self.initial_scale = initial_scale
        self.dynamic_growth_steps = dynamic_growth_steps
        self.dynamic_scale = self.initial_scale
        self.step_counter = 0

    def __getattr__(self, name: str) -> Any:
        """All other attributes are the inner optimizer's: ``iterations``, ``learning_rate``, ``get_slot`` ..."""
        if name == "inner_optimizer" or name.startswith("_"):
            raise AttributeError(name)
        try:
            return getattr(self.inner_optimizer, name)
        except AttributeError as error:
            if hasattr(type(self.inner_optimizer), name):
                raise  # from a property
            names = [*dir(type(self)), *_CHECKS, *dir(self.inner_optimizer)]
            raise AttributeError(unknown_attribute(self, name, names)) from error

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute of this optimizer or a hyperparameter of the inner one."""
        inner = self.__dict__.get("inner_optimizer")
        if name in _CHECKS:
            super().__setattr__(name, _CHECKS[name](name, value))
        elif hasattr(type(self), name):
            super().__setattr__(name, value)
        elif inner is not None and (name in vars(inner) or hasattr(type(inner), name)):
            setattr(inner, name, value)
        elif is_own(self):
            raise AttributeError(unknown_attribute(self, name, [*_CHECKS, *settable(inner or self)]))
        else:
            super().__setattr__(name, value)

    @never_raises
    def __repr__(self) -> str:
        """The constructor's call with all arguments that are not at their defaults."""
        defaults = {"initial_scale": 2.0**15, "dynamic_growth_steps": 2000}
        changed = [(name, getattr(self, name)) for name in defaults if getattr(self, name) != defaults[name]]
        return call_text(type(self), [("", vars(self)["inner_optimizer"]), *changed])

    @html_or_none
    def _repr_html_(self) -> str:
        own = [(name, getattr(self, name)) for name in _SAVED]
        return html_table(name_of(type(self)), own, self.inner_optimizer._repr_html_() or "")

    @property
    def current_learning_rate(self) -> float:
        """The learning rate of the next step, as in :class:`Adam`."""
        return self.inner_optimizer.current_learning_rate

    def scale_loss(self, loss: AnyArray) -> AnyArray:
        """Return ``loss * dynamic_scale``. ``apply_gradients`` takes the gradients of this."""
        return loss * self.dynamic_scale

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Gradient | None, VariableLike]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> np.int64 | None:
        """Make a step if all gradients of the scaled loss are finite, then adjust the scale.

        The arguments and errors are the same as for :meth:`Adam.apply_gradients`.

        Returns:
            ``iterations``, unchanged if the step was skipped; None for an empty list.
        """
        inner = self.inner_optimizer
        with parts_of(inner).runtime.lock:
            _require_no_factor(inner)
            pairs = check_pairs_list(grads_and_vars)
            if not pairs:
                return None
            self._adjust(Stepper(parts_of(inner)).apply(inner, pairs, self.dynamic_scale))
            return inner.iterations

    def _adjust(self, all_finite: bool) -> None:
        if not all_finite:
            self.dynamic_scale, self.step_counter = max(self.dynamic_scale / 2, 1.0), 0
        elif self.step_counter + 1 < self.dynamic_growth_steps:
            self.step_counter += 1
        else:
            doubled = self.dynamic_scale * 2
            self.dynamic_scale, self.step_counter = doubled if doubled <= _LARGEST else self.dynamic_scale, 0

    def _refresh(self, variable: Variable | None, ids: HostArray | None) -> None:
        self.inner_optimizer._refresh(variable, ids)

    @property
    def _told(self) -> set[str]:
        return parts_of(self.inner_optimizer).runtime.told

    @property
    def _loss_scale(self) -> float:
        return self.dynamic_scale

    def get_config(self) -> Config:
        """The constructor's arguments as plain JSON values, including those of the inner optimizer."""
        inner = {"class_name": type(self.inner_optimizer).__name__, "config": self.inner_optimizer.get_config()}
        return {
            "inner_optimizer": inner,
            "initial_scale": self.initial_scale,
            "dynamic_growth_steps": self.dynamic_growth_steps,
        }

    @class_only
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """Make an optimizer from the result of ``get_config``; ``config`` is not modified."""
        arguments = dict(config)
        inner = arguments.pop("inner_optimizer", None)
        if not isinstance(inner, Mapping) or not {"class_name", "config"} <= set(inner):
            raise ValueError(f"inner_optimizer: {inner!r}, expected a dict with 'class_name' and 'config'")
        classes = {"Adam": Adam, "AdamW": AdamW, **(custom_objects or {})}
        if inner["class_name"] not in classes:
            raise ValueError(f"inner_optimizer: {inner['class_name']!r}, expected one of {sorted(classes)}")
        return cls(classes[inner["class_name"]].from_config(inner["config"], custom_objects), **arguments)

    def save(self, path: str | os.PathLike[str], variables: Iterable[VariableLike] | None = None) -> None:
        """Save the optimizer as :meth:`Adam.save` does, with the scale and the number of good steps."""
        with parts_of(self.inner_optimizer).runtime.lock:
            state = {name: getattr(self, name) for name in _SAVED}
            serialization.save(self.inner_optimizer, path, variables, state)

    @class_only
    def load(
        cls,
        path: str | os.PathLike[str],
        variables: Iterable[VariableLike],
        custom_objects: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load what :meth:`save` wrote, as :meth:`Adam.load` does; ``custom_objects`` may hold a subclass of Adam."""
        others = [entry for entry in (custom_objects or {}).values() if isinstance(entry, type)]
        classes: list[type[Adam]] = [Adam, AdamW, *(entry for entry in others if issubclass(entry, Adam))]
        inner, state = serialization.load(classes, path, variables, custom_objects)
        try:
            if not isinstance(state, dict) or set(state) != set(_SAVED):
                raise ValueError(f"state of {type(inner).__name__}, expected LossScaleOptimizer")
            optimizer = cls(inner, state["initial_scale"], state["dynamic_growth_steps"])
            optimizer.dynamic_scale = state["dynamic_scale"]
            optimizer.step_counter = state["step_counter"]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fsdecode(path)}: {error}") from None
        return optimizer


_LARGEST = 2.0**126  # its inverse is the smallest normal float32
_SAVED = ("initial_scale", "dynamic_growth_steps", "dynamic_scale", "step_counter")


def _require_no_factor(inner_optimizer: Adam) -> None:
    if inner_optimizer.loss_scale_factor is not None:
        raise ValueError("inner_optimizer: has a loss_scale_factor, expected None: the scale is dynamic")


def _check_scale(name: str, value: AnyArray) -> float:
    scale = check_number(name, value)
    if not 1 <= scale <= _LARGEST:
        raise ValueError(f"{name}: {scale}, expected 1 <= {name} <= {_LARGEST}")
    return scale


def _check_inner(name: str, value: object) -> Adam:
    if not isinstance(value, Adam):
        raise TypeError(f"{name}: {type(value).__name__}, expected a fastadam.Adam")
    _require_no_factor(value)
    return value


_CHECKS: dict[str, Callable[[str, AnyArray], object]] = {
    "inner_optimizer": _check_inner,
    "initial_scale": _check_scale,
    "dynamic_scale": _check_scale,
    "dynamic_growth_steps": check_count,
    "step_counter": check_iterations,
}
