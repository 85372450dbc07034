"""Suggestions for keyword arguments that a function does not have."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

__all__ = ["ELSEWHERE", "suggests_keywords", "synonyms"]

_Callable = TypeVar("_Callable", bound=Callable[..., object])

# Each group names one argument in Keras, TensorFlow, PyTorch, optax and papers. The first that the function has is
# suggested.
_SYNONYMS = (
    (
        "learning_rate",
        "lr",
        "lr_schedule",
        "learning_rate_schedule",
        "schedule",
        "scheduler",
        "lr_scheduler",
        "step_size",
        "eta",
    ),
    ("initial_learning_rate", "learning_rate", "lr", "initial_lr", "base_lr", "init_value", "start_lr"),
    ("beta_1", "b1", "betas", "beta1", "momentum"),
    ("beta_2", "b2", "betas", "beta2", "rho"),
    ("epsilon", "eps", "epsilon_hat"),
    ("clipnorm", "clip_norm", "grad_clip_norm", "clip_grad_norm"),
    ("clipvalue", "clip_value", "grad_clip_value", "clip_grad_value"),
    (
        "global_clipnorm",
        "global_clip_norm",
        "clip_global_norm",
        "clip_by_global_norm",
        "max_norm",
        "max_grad_norm",
        "grad_clip",
    ),
    ("weight_decay", "weight_decay_rate", "wd", "l2"),
    ("use_ema", "ema"),
    ("ema_momentum", "ema_decay", "ema_rate"),
    ("ema_overwrite_frequency", "ema_frequency", "ema_steps"),
    ("gradient_accumulation_steps", "accumulation_steps", "accumulate_steps", "accumulate_grad_batches"),
    ("loss_scale_factor", "loss_scale"),
    ("initial_scale", "init_scale", "loss_scale", "initial_loss_scale"),
    ("dynamic_growth_steps", "growth_interval", "scale_window", "growth_steps"),
    ("inner_optimizer", "optimizer", "opt"),
    ("grad_factor", "grad_scale", "gradient_scale", "scale"),
    ("sparse_update", "sparse", "lazy", "mode"),
    ("decay_steps", "first_decay_steps", "total_steps", "num_steps", "max_steps", "transition_steps", "T_max", "T_0"),
    ("t_mul", "T_mult"),
    ("decay_rate", "gamma"),
    ("boundaries", "milestones"),
    ("end_learning_rate", "end_value", "end_lr", "min_lr"),
    ("warmup_steps", "warmup", "num_warmup_steps"),
    ("warmup_target", "peak_value", "peak_lr"),
    ("vars", "params", "variables", "var_list"),
    ("grads", "gradients"),
    ("m", "exp_avg", "mu", "momentums"),
    ("v", "exp_avg_sq", "nu", "velocities"),
    ("vhat", "max_exp_avg_sq", "nu_max", "velocity_hats"),
    ("step", "t", "iterations", "count"),
    ("value", "initial_value", "data"),
    ("dense_shape", "shape"),
    ("axes", "ax"),
    ("moments", "moments_dtype", "state_dtype", "optim_bits", "mu_dtype"),
    ("master", "master_weights", "master_dtype"),
    ("stochastic_rounding", "bf16_stochastic_round"),
    ("float32_for", "min_8bit_size", "fp32_for"),
)
# Options that only PyTorch's optimizers have.
ELSEWHERE = dict.fromkeys(
    ("params", "fused", "foreach", "maximize", "capturable", "differentiable"), "fastadam.torch.Adam has it"
)
_NOTES = {
    ("eps", "epsilon"): " It is added before the bias correction, PyTorch's eps after it.",
    ("epsilon", "eps"): " It is added after the bias correction, TensorFlow's epsilon before it.",
}


def suggests_keywords(
    called: str | None = None, elsewhere: Mapping[str, str] | None = None
) -> Callable[[_Callable], _Callable]:
    """Decorate a function or class so that its TypeError for an unknown keyword suggests the right one.

    A call that succeeds costs one more Python call, 0.2 us. Names are compared only after a TypeError.

    Args:
        called: What the message says the keyword was passed to; None means the name of the function or class.
        elsewhere: What to do instead of passing an option that the function does not have. Keys are the first names of
            the groups of synonyms.
    """

    def decorate(decorated: _Callable) -> _Callable:
        is_class = isinstance(decorated, type)
        function: Callable[..., object] = getattr(decorated, "__init__") if is_class else decorated  # noqa: B009  mypy

        @functools.wraps(function)
        def checked(*args: object, **kwargs: object) -> object:
            try:
                return function(*args, **kwargs)
            except TypeError:
                names = [name for name in inspect.signature(function).parameters if name != "self"]
                unknown = next((keyword for keyword in kwargs if keyword not in names), None)
                if unknown is None:
                    raise
                hint = _hint(unknown, names, elsewhere or {})
                what = called or decorated.__qualname__.removesuffix(".__init__")
                raise TypeError(f"Unexpected keyword argument passed to {what}: {unknown}{hint}") from None

        if not is_class:
            return cast(_Callable, checked)
        setattr(decorated, "__init__", checked)  # noqa: B010  mypy
        return decorated

    return decorate


def synonyms(name: str, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that other libraries call ``name``."""
    matches = [next((synonym for synonym in group if synonym in names), None) for group in _SYNONYMS if name in group]
    return list(dict.fromkeys(match for match in matches if match))


def _hint(keyword: str, names: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    meant = synonyms(keyword, names)
    if not meant:
        if keyword in elsewhere:
            return f"; {elsewhere[keyword]}"
        for group in (group for group in _SYNONYMS if keyword in group):
            if group[0] in elsewhere:
                return f"; {elsewhere[group[0]]}"
        meant = difflib.get_close_matches(keyword, names, n=1, cutoff=0.7)
    return f"; did you mean {' and '.join(meant)}?{_NOTES.get((keyword, meant[0]), '')}" if meant else ""
