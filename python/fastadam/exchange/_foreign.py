"""State dicts of optimizers with few bits, recognised when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadam.exchange._bitsandbytes import from_bitsandbytes, is_bitsandbytes
from fastadam.exchange._torchao import from_torchao, is_torchao

__all__ = ["foreign_states"]


def foreign_states(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """What PyTorch's optimizers would have saved, if bitsandbytes or torchao saved this; else the argument itself.

    Raises:
        TypeError: An entry of such a state is not a tensor of the right dtype.
        ValueError: An entry of such a state is missing, or has the wrong shape or range.
    """
    states = state_dict.get("state")
    found = [state for state in states.values() if isinstance(state, Mapping)] if isinstance(states, Mapping) else []
    if any(map(is_bitsandbytes, found)):
        return from_bitsandbytes(state_dict)
    return from_torchao(state_dict) if any(map(is_torchao, found)) else state_dict
