"""Parameters without memory, as for estimates of memory: on the meta device, or FakeTensors of a simulation.

Their states are made and their steps counted as by torch's optimizers; there is nothing to compute.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastadam.torch._checks import Group, ParamState, States, check_flags, label_of
from fastadam.torch._formats import check_formats
from fastadam.torch._options import Options
from fastadam.torch._state import states_of

__all__ = ["Simulated", "hide_gradients", "is_simulation", "refuse_simulation"]

_modes = torch._C._len_torch_dispatch_stack


def is_simulation() -> bool:
    """Whether operators are only simulated, by a FakeTensorMode."""
    return _modes() > 0 and any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def refuse_simulation(gradients: list[Tensor | None]) -> None:
    """Raise if parameters in memory have gradients while operators are only simulated: native steps are real."""
    if is_simulation() and any(gradient is not None for gradient in gradients):
        raise RuntimeError("params: tensors with data under FakeTensorMode, expected FakeTensors")


def hide_gradients(params: list[Tensor], gradients: list[Tensor | None]) -> list[int]:
    """Replace the gradients of parameters without memory by None; return the places of these parameters."""
    places = [
        place
        for place, (param, gradient) in enumerate(zip(params, gradients, strict=True))
        if gradient is not None and (param.is_meta or isinstance(param, FakeTensor))
    ]
    for place in places:
        gradients[place] = None
    return places


class Simulated:
    """The parameters without memory that have a gradient, and their states, which may not be the optimizer's yet."""

    def __init__(self) -> None:
        self._stepped: list[tuple[Tensor, ParamState]] = []

    def add(
        self,
        index: int,
        group: Group,
        places: list[int],
        state: States,
        options: Options,
    ) -> None:
        """Add the parameters of a group at these places, or raise what is wrong with them."""
        check_formats(group, options.sparse_update)
        for place in places:
            param, label = group["params"][place], label_of(group, index, place)
            check_flags(group, param, label, options.sparse_update)
            made = states_of(state, [param], [label], options.state_format(group))
            self._stepped.append((param, *made))

    def finish(self, state: States) -> None:
        """Count the step."""
        for param, named in self._stepped:
            state[param] = named
            named["step"].add_(1)
