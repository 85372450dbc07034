"""What a GradScaler says of a step: to the host, which waits for it, or to a GPU, where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadam.torch._counts import lies_on_gpu

__all__ = ["Scaling"]


class Scaling:
    """``grad_scale`` and ``found_inf``: what the gradients were multiplied by, and whether the step is to be skipped.

    Args:
        grad_scale: A number or a tensor of one element; None for 1.
        found_inf: Likewise; anything but 0 skips the step. None for 0.
    """

    def __init__(self, grad_scale: Any, found_inf: Any) -> None:
        self._grad_scale, self._found_inf = grad_scale, found_inf
        self._gradient_scale = 1.0 if grad_scale is None else None  # None: not read yet
        self._skips = False if found_inf is None else None
        self._placed: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def gradient_scale(self) -> float:
        """By which the host has gradients multiplied; waits for a GPU that knows it, once."""
        if self._gradient_scale is None:
            self._gradient_scale = 1.0 / float(self._grad_scale)
        return self._gradient_scale

    @property
    def skips(self) -> bool:
        """Whether the step is to be skipped; waits for a GPU that knows it, once."""
        if self._skips is None:
            self._skips = bool(float(self._found_inf))
        return self._skips

    @property
    def host_skips(self) -> bool:
        """The same, as far as that is known without waiting."""
        return self._skips is not False and not lies_on_gpu(self._found_inf) and self.skips

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Both as float32 on a GPU, without waiting, for as long as this lives; None for what lies on no GPU."""
        if device not in self._placed:
            self._placed[device] = _place(self._grad_scale, device), _place(self._found_inf, device)
        return self._placed[device]


def _place(number: Any, device: torch.device) -> Tensor | None:
    return number.detach().to(device, torch.float32, non_blocking=True) if lies_on_gpu(number) else None
