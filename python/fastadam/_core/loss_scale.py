"""Dynamic loss scaling, for gradients computed in float16: Keras's LossScaleOptimizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastadam._core import bucketed
from fastadam._core.adam import Adam
from fastadam._core.adamw import AdamW
from fastadam._core.bucketed import check_begin
from fastadam._core.common.checks import (
    check_bool,
    check_count,
    check_custom_objects,
    check_iterations,
    check_number,
    shown,
)
from fastadam._core.common.configs import class_of, loss_scale_arguments
from fastadam._core.common.display import call_text, html_or_none, html_table, name_of, never_raises
from fastadam._core.common.frameworks import named_in_keras
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.strict import class_only, is_own, settable, unknown_attribute
from fastadam._core.common.warning import warn
from fastadam._core.minimize import Minimizer, scaled
from fastadam._core.pairs import check_copies, check_pairs_list
from fastadam._core.parts import parts_of
from fastadam._core.saving.delta_writer import save_delta
from fastadam._core.saving.reader import load_optimizer
from fastadam._core.saving.writer import save_optimizer
from fastadam._core.step import Stepper

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.common.types import AnyArray, Array, Config, Gradient, HostArray, VariableLike
    from fastadam._core.native.variable import Variable

__all__ = ["LossScaleOptimizer"]


class _Scaling(NamedTuple):
    """What a dynamic scale goes by."""

    scale: float
    good_steps: int  # since the scale has changed
    skipped: int  # steps in a row that were skipped at min_scale

    def after_good_step(self, growth_steps: int) -> _Scaling:
        if self.good_steps + 1 < growth_steps:
            return _Scaling(self.scale, self.good_steps + 1, 0)
        doubled = self.scale * 2
        return _Scaling(doubled if doubled <= _LARGEST else self.scale, 0, 0)

    def after_skipped_step(self, min_scale: float) -> _Scaling:
        skipped = self.skipped + 1 if self.scale == min_scale else 0
        return _Scaling(max(self.scale / 2, min_scale), 0, skipped)


class _Journal(NamedTuple):
    """The scaling changes together with the count of calls, which no signal handler can separate from the step."""

    before: _Scaling
    calls: int
    after: _Scaling  # once there were more calls


@named_in_keras
class LossScaleOptimizer(Minimizer):
    r"""Dynamic loss scaling for an optimizer: the loss is multiplied by a scale that adapts to the gradients.

    ``apply_gradients`` divides the gradients of ``scale_loss(loss)`` by the scale. If any element of any gradient, or a
    norm that is to be clipped, is not finite, it skips the whole step, does not count it in ``iterations``, and halves
    the scale. After ``dynamic_growth_steps`` good steps in a row the scale is doubled. The scale stays within
    [``min_scale``, 2**126]; in Keras 3 it can fall to 0. Ten skipped steps in a row at ``min_scale`` cause a
    UserWarning, once. Gradients are checked before they are clipped, in the same pass that computes their norm.

    Attributes of the inner optimizer (``iterations``, ``learning_rate``, ``get_slot`` ...) can be used on this one.

    Args:
        inner_optimizer: An :class:`Adam` without a ``loss_scale_factor``.
        initial_scale: The first scale. Scaling by a power of two does not change results.
        dynamic_growth_steps: Number of good steps after which the scale is doubled.
        min_scale: The scale is not halved below this, at least 2**-126. Under 1 it makes large gradients smaller.

    Raises:
        TypeError: ``inner_optimizer`` is not an Adam, or a number has the wrong type.
        ValueError: ``inner_optimizer`` has a ``loss_scale_factor``; a scale is outside [``min_scale``, 2**126];
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
    dynamic_growth_steps: int
    min_scale: float
    _journal: _Journal

    @suggests_keywords("optimizer")
    def __init__(
        self,
        inner_optimizer: Adam,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        *,
        min_scale: float = 1.0,
    ) -> None:
        self.inner_optimizer = inner_optimizer
        self.min_scale = min_scale
        self.initial_scale = initial_scale
        self.dynamic_growth_steps = dynamic_growth_steps
        self._set(_Scaling(self.initial_scale, 0, 0))

    @property
    def dynamic_scale(self) -> float:
        """The present scale."""
        return self._scaling.scale

    @dynamic_scale.setter
    def dynamic_scale(self, value: float) -> None:
        self._set(self._scaling._replace(scale=value))

    @property
    def step_counter(self) -> int:
        """Good steps since the scale has changed."""
        return self._scaling.good_steps

    @step_counter.setter
    def step_counter(self, value: int) -> None:
        self._set(self._scaling._replace(good_steps=value))

    @property
    def _scaling(self) -> _Scaling:
        before, calls, after = self._journal
        return after if int(parts_of(self.inner_optimizer).state.calls) > calls else before

    def _set(self, scaling: _Scaling) -> None:
        self._journal = _Journal(scaling, -1, scaling)

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
            checked = _CHECKS[name](name, value)
            self._check_bounds(name, checked)
            super().__setattr__(name, checked)
        elif hasattr(type(self), name) or name[0] == "_":
            super().__setattr__(name, value)
        elif inner is not None and (name in vars(inner) or hasattr(type(inner), name)):
            setattr(inner, name, value)
        elif is_own(self):
            raise AttributeError(unknown_attribute(self, name, [*_CHECKS, *settable(inner or self)]))
        else:
            super().__setattr__(name, value)

    def _check_bounds(self, name: str, value: Any) -> None:
        """Raise ValueError unless min_scale <= dynamic_scale, initial_scale, with a new value of one of them."""
        if not name.endswith("_scale"):
            return
        least = 1 / _LARGEST if name == "min_scale" else self.min_scale
        if not least <= value <= _LARGEST:
            raise ValueError(f"{name}: {value}, expected {least:g} <= {name} <= {_LARGEST}")
        if name == "min_scale" and "_journal" in vars(self) and value > (present := self.dynamic_scale):
            raise ValueError(f"min_scale: {value}, expected at most dynamic_scale, which is {present}")

    @never_raises
    def __repr__(self) -> str:
        """The constructor's call with all arguments that are not at their defaults."""
        defaults = {"initial_scale": 2.0**15, "dynamic_growth_steps": 2000, "min_scale": 1.0}
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
        return scaled(loss, self.dynamic_scale)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Gradient | None, VariableLike]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        *,
        copies: Iterable[Array | None] | None = None,
        zero_grads: bool = False,
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
            mine, zeroes = check_copies(copies, pairs), check_bool("zero_grads", zero_grads)
            stepper = Stepper(parts_of(inner))
            return self._adjust(lambda scale: stepper.apply(inner, pairs, scale, mine, zero_grads=zeroes))

    def begin_step(self, *, early: bool = False, threads: int | None = None) -> None:
        """Begin a step in buckets, as :meth:`Adam.begin_step`, of gradients that have the present scale."""
        inner = self.inner_optimizer
        early, threads = check_begin(early, threads)
        with parts_of(inner).runtime.lock:
            _require_no_factor(inner)
            bucketed.begin(Stepper(parts_of(inner)), inner, early=early, threads=threads, loss_scale=self.dynamic_scale)

    def end_step(self) -> np.int64:
        """Make the step of all buckets if all gradients are finite, then adjust the scale.

        Returns:
            ``iterations``, unchanged if the step was skipped.

        Raises:
            RuntimeError: As for :meth:`Adam.end_step`.
        """
        stepper = Stepper(parts_of(self.inner_optimizer))
        with stepper.runtime.lock:
            return self._adjust(lambda _: bucketed.end(stepper))

    def _adjust(self, make: Callable[[float], bool]) -> np.int64:
        """Make a step with the present scale, then adjust this."""
        inner = self.inner_optimizer
        scaling, calls = self._scaling, int(parts_of(inner).state.calls)
        good = scaling.after_good_step(self.dynamic_growth_steps)
        self._journal = _Journal(scaling, calls, good)  # holds as soon as the step has been counted
        if make(scaling.scale):
            self._set(good)
            return inner.iterations
        bad = scaling.after_skipped_step(self.min_scale)
        self._set(bad)
        if bad.skipped == _STUCK:
            self._warn_of_stuck_scale()
        return inner.iterations

    def _warn_of_stuck_scale(self) -> None:
        if "loss scale" not in self._told:
            self._told.add("loss scale")
            warn(
                f"dynamic_scale: {_STUCK} steps in a row were skipped at min_scale, {self.min_scale:g}; their "
                "gradients are not finite: look for NaN or infinity in the loss and the variables, or set min_scale "
                "lower if gradients overflow"
            )

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
            **self._own_config(),
        }

    def _own_config(self) -> Config:
        """What Keras does not know, if it is not at its default."""
        return {} if self.min_scale == 1 else {"min_scale": self.min_scale}

    @class_only
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """Make an optimizer from ``get_config`` or ``keras.optimizers.serialize``, as :meth:`Adam.from_config` does."""
        custom_objects = check_custom_objects(custom_objects)
        arguments = loss_scale_arguments(config)
        inner = arguments.pop("inner_optimizer", None)
        if not isinstance(inner, Mapping) or not {"class_name", "config"} <= set(inner):
            raise ValueError(f"inner_optimizer: {shown(inner)}, expected a dict with 'class_name' and 'config'")
        classes = {"Adam": Adam, "AdamW": AdamW, **custom_objects}
        kind = class_of(inner)
        if kind not in classes:
            raise ValueError(f"inner_optimizer: {kind!r}, expected one of {sorted(classes)}")
        return cls(classes[kind].from_config(inner["config"], custom_objects), **arguments)

    def save(
        self,
        path: str | os.PathLike[str],
        variables: Iterable[VariableLike] | None = None,
        *,
        values: bool = False,
    ) -> None:
        """Save the optimizer as :meth:`Adam.save` does, with the scale and the number of good steps."""
        with parts_of(self.inner_optimizer).runtime.lock:
            save_optimizer(self.inner_optimizer, path, variables, self._saved, values=values)

    def save_delta(self, path: str | os.PathLike[str]) -> None:
        """Save what has changed since the last file as :meth:`Adam.save_delta` does, with the scale."""
        with parts_of(self.inner_optimizer).runtime.lock:
            save_delta(self.inner_optimizer, path, self._saved)

    def _saved(self) -> Config:
        return {**{name: getattr(self, name) for name in _SAVED}, **self._own_config()}

    @class_only
    def load(
        cls,
        path: str | os.PathLike[str],
        variables: Iterable[VariableLike],
        custom_objects: Mapping[str, Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        *,
        deltas: Iterable[str | os.PathLike[str]] = (),
        slots: Sequence[Mapping[str, HostArray] | None] | None = None,
    ) -> Self:
        """Load what :meth:`save` wrote, as :meth:`Adam.load` does; ``custom_objects`` may hold a subclass of Adam."""
        others = [entry for entry in check_custom_objects(custom_objects).values() if isinstance(entry, type)]
        classes: list[type[Adam]] = [Adam, AdamW, *(entry for entry in others if issubclass(entry, Adam))]

        def finish(inner: Adam, state: Config | None) -> LossScaleOptimizer:
            if not isinstance(state, dict) or {*state, "min_scale"} != {*_SAVED, "min_scale"}:
                raise ValueError(f"state of {type(inner).__name__}, expected LossScaleOptimizer")
            scales: Config = {name: state[name] for name in ("initial_scale", "dynamic_growth_steps")}
            optimizer = cls(inner, **scales, min_scale=state.get("min_scale", 1.0))
            optimizer.dynamic_scale = state["dynamic_scale"]
            optimizer.step_counter = state["step_counter"]
            return optimizer

        loaded: Self = load_optimizer(classes, path, variables, finish, custom_objects, changes, deltas, slots)
        return loaded


_LARGEST = 2.0**126  # its inverse is the smallest normal float32
_STUCK = 10
_SAVED = ("initial_scale", "dynamic_growth_steps", "dynamic_scale", "step_counter")


def _require_no_factor(inner_optimizer: Adam) -> None:
    if inner_optimizer.loss_scale_factor is not None:
        raise ValueError("inner_optimizer: has a loss_scale_factor, expected None: the scale is dynamic")


def _check_inner(name: str, value: object) -> Adam:
    if not isinstance(value, Adam):
        raise TypeError(f"{name}: {type(value).__name__}, expected a fastadam.Adam")
    _require_no_factor(value)
    return value


_CHECKS: dict[str, Callable[[str, AnyArray], object]] = {
    "inner_optimizer": _check_inner,
    "initial_scale": check_number,
    "dynamic_scale": check_number,
    "min_scale": check_number,
    "dynamic_growth_steps": check_count,
    "step_counter": check_iterations,
}
