"""The extension module for arrays on a GPU: what _cpu.pyi declares, and what only GPUs need. Private to fastadam."""

from typing import Any

import numpy.typing as npt
from fastadam import _cpu

architectures: str

class Buffer(_cpu.Buffer): ...
class Slices(_cpu.Slices): ...
class ClosedForms(_cpu.ClosedForms): ...

class Plan(_cpu.Plan):
    """Launches of one set of variables, on the stream that their library works on."""

    def set_device_numbers(
        self, rate: Any, grad_scale: Any = None, found_inf: Any = None, counts: bool = False
    ) -> None:
        """Set numbers on the GPU, or None, that every later step reads.

        rate: replaces ``learning_rate``; one float32 or float64.
        grad_scale: what gradients have been multiplied by; one float32.
        found_inf: a step is skipped if this is not 0: nothing is written, and t is not counted; one float32.
        counts: t is one more than in the last step of the context, and ``step`` is ignored.
        """
    def can_count(self, hyper: tuple[Any, ...]) -> bool:
        """Whether the GPU can count t, or read a rate, with these betas. Do not call it during a capture."""

class Context:
    """What the plans of one optimizer share on one device."""

    def __init__(self, device: int) -> None: ...
    @property
    def device(self) -> int: ...
    def take_failure(self) -> tuple[int, str] | None:
        """The counter before the first step that was skipped for an invalid index, and the message; reported once."""
    def wait(self) -> None: ...
    @property
    def is_captured(self) -> bool: ...
    def step(self) -> int:
        """The t of the last step; waits for the GPU."""

class History:
    """The rates of a deferred table on its device."""

    def __init__(
        self,
        alphas: npt.NDArray[Any],
        keeps: npt.NDArray[Any],
        peaks: npt.NDArray[Any],
        steps: int,
        device: int,
        stream: int,
    ) -> None: ...

class Gather:
    """Reads rows by ids on a GPU."""

    def __init__(self, device: int) -> None: ...
    def run(self, table: Buffer, ids: Any, out: Any, context: Context) -> None:
        """Waits, on the GPU, for the work of the context, as its later work waits for this."""
    def take_failure(self) -> tuple[int, int] | None:
        """Position and value of the first invalid id of an earlier call; reported once."""

class DeviceArray:
    """Memory of a GPU with a shape and a dtype."""

    def __init__(self, shape: list[int], dtype: str, order: str, device: int, stream: int) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def get(self) -> npt.NDArray[Any]: ...

def device_count() -> tuple[int, str]: ...
def stream_of(array: Any) -> int | None: ...
def is_capturing(array: Any) -> bool: ...
def to_host(array: Any) -> npt.NDArray[Any]: ...
def assign(array: Any, values: npt.NDArray[Any]) -> None: ...
def require_place(buffer: Buffer, like: Buffer) -> None: ...
