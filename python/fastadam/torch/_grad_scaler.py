"""What a GradScaler says about a step: the host reads it, which may wait for a GPU, or the GPU reads it by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import SupportsFloat, TypeAlias

import torch
from torch import Tensor

from fastadam.torch._layout import local_of
from fastadam.torch._step_count import is_on_gpu

__all__ = ["Number", "ScaledStep"]

Number: TypeAlias = "SupportsFloat | None"  # a Python number, or a tensor of one element
_LARGEST = 2.0**127  # a factor that float32 has, whatever it is rounded to


class ScaledStep:
    """The factor of the gradients, and whether the step is to be skipped.

    Args:
        grad_scale: What the gradients were multiplied by; None for 1.
        found_inf: Anything but 0 skips the step; None for 0.
    """

    def __init__(self, grad_scale: Number, found_inf: Number) -> None:
        self._grad_scale, self._found_inf = grad_scale, found_inf
        self._factor = 1.0 if grad_scale is None else None  # None: not read yet
        self._is_extreme = False
        self._skips = False if found_inf is None else None
        self._placed: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def gradient_scale(self) -> float:
        """The factor that a native step is to multiply the gradients by, after :meth:`divided`.

        Reading it may wait for a GPU, once.
        """
        if self._factor is None:
            self._factor = self._read()
        return self._factor

    @property
    def is_extreme(self) -> bool:
        """Whether kernels cannot multiply by 1 / the scale, which is not a number above 0 in float32."""
        return self.gradient_scale == 1.0 and self._is_extreme

    def _read(self) -> float:
        scale = _float_of(self._grad_scale)
        self._is_extreme = not 1 / _LARGEST <= scale < float("inf")
        return 1.0 if self._is_extreme else 1.0 / scale

    def divided(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients, divided by the scale if kernels cannot do it."""
        if not self.is_extreme:
            return gradients
        scale = _float_of(self._grad_scale)
        return [gradient / scale for gradient in gradients]

    @property
    def skips(self) -> bool:
        """Whether the step is to be skipped; reading it may wait for a GPU, once."""
        if self._skips is None:
            self._skips = bool(_float_of(self._found_inf))
        return self._skips

    @property
    def host_skips(self) -> bool:
        """Whether the host knows, without waiting, that the step is to be skipped."""
        return self._skips is not False and not is_on_gpu(self._found_inf) and self.skips

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Both numbers as float32 on a GPU, without waiting; None for a number that is not on a GPU."""
        if device not in self._placed:
            self._placed[device] = _place(self._grad_scale, device), _place(self._found_inf, device)
        return self._placed[device]

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """After the step: divide the gradients by the scale, as torch's fused optimizers do, unless it was skipped."""
        if self._grad_scale is None:
            return
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in {id(each): each for each in gradients}.values():  # parameters may share one
            by_device.setdefault(gradient.device, []).append(_values_of(gradient))
        for device, values in by_device.items():
            scale, found_inf = self.on(device) if is_on_gpu(values[0]) else (None, None)
            if scale is not None or found_inf is not None:
                _unscale_on_gpu(values, scale, found_inf, self._grad_scale)
            elif not self.skips:
                torch._foreach_div_(values, _float_of(self._grad_scale))


def _values_of(gradient: Tensor) -> Tensor:
    """What an operator in place has to change of a gradient: real numbers of this process."""
    values = local_of(gradient.detach())
    values = values._values() if values.is_sparse else values
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() and not values.is_conj() else values


def _unscale_on_gpu(values: list[Tensor], scale: Tensor | None, found_inf: Tensor | None, known: Number) -> None:
    """Divide by ``scale``, or by ``known`` if the host has it, unless ``found_inf`` says that the step was skipped."""
    like = values[0]
    if scale is None:
        scale = torch.full((), _float_of(known), device=like.device)
    inverse = scale.reshape(()).double().reciprocal().float()
    if found_inf is not None:
        inverse = torch.where(found_inf.reshape(()) == 0, inverse, torch.ones_like(inverse))
    torch._amp_foreach_non_finite_check_and_unscale_(values, torch.zeros_like(inverse), inverse)


def _float_of(number: Number) -> float:
    return 0.0 if number is None else float(number)


def _place(number: Number, device: torch.device) -> Tensor | None:
    if not isinstance(number, Tensor) or not is_on_gpu(number):
        return None
    return number.detach().to(device, torch.float32, non_blocking=True)
