"""Adam and AdamW for PyTorch: ``torch.optim.Optimizer`` subclasses that step with fastadam's kernels.

They take the arguments, parameter groups and state dicts of ``torch.optim.Adam`` and ``AdamW``, and in the same
optimizer the sparse gradients of ``nn.Embedding(sparse=True)``.
"""

from __future__ import annotations

from fastadam._core.common.frameworks import missing
from fastadam._core.common.public import publish

try:
    from fastadam.torch._adamw import AdamW
    from fastadam.torch._deepspeed import DeepSpeedCPUAdam
    from fastadam.torch._optimizer import Adam
    from fastadam.torch._overlap import Overlap, overlap
except ModuleNotFoundError as _error:
    raise missing("fastadam.torch", _error) from None

__all__ = ["Adam", "AdamW", "DeepSpeedCPUAdam", "Overlap", "overlap"]

publish(globals())


def __dir__() -> list[str]:
    return sorted(__all__)
