"""What a step did to each variable, for logs: the result of ``optimizer.telemetry()``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastadam._core.common.checks import check_list, is_real, shown

__all__ = ["Telemetry"]

_MEASURES = ("gradient_norm", "update_rms", "parameter_rms", "unchanged", "not_finite")


class Telemetry:
    """Measures of the last step, which the step itself took: arrays with one number for each variable.

    Sums are in float64 over a tree of fixed shape, so they have the same bits whatever the threads, and are within 1e-6
    of the exact sums. ``update_rms`` counts elements that move by less than 1e-19 of the learning rate as 0.

    Attributes:
        names: What the variables are called.
        gradient_norm: Norm of each gradient, divided by the loss scale, before clipping.
        update_rms: Root mean square of what the step added to the variable.
        parameter_rms: Of the variable after the step.
        unchanged: Share of its elements that the step did not change, in [0, 1]: of the rounded copy if there is one.
        not_finite: Number of elements of the gradient that are infinite or NaN.
        size: Number of elements.

    >>> import numpy as np, fastadam
    >>> w = fastadam.Variable(np.ones(4, np.float32), name="w")
    >>> opt = fastadam.Adam(0.1, telemetry=True)
    >>> step = opt.apply_gradients([(np.full(4, 0.5, np.float32), w)])
    >>> report = opt.telemetry()
    >>> report.names, report.gradient_norm, report.update_rms.round(4)
    (['w'], array([1.]), array([0.1]))
    >>> report.to_dict()["gradient_norm/w"]
    1.0
    """

    def __init__(self, names: Sequence[str], rows: npt.NDArray[np.float64]) -> None:
        self.names: list[str] = check_list("names", names)
        if not isinstance(rows, np.ndarray) or rows.shape != (len(self.names), 6) or not is_real(rows.dtype):
            raise TypeError(f"rows: {shown(rows, 60)}, expected an array of 6 numbers for each name")
        gradient_norm, update_rms, parameter_rms, unchanged, not_finite, size = rows.T.copy()
        self.gradient_norm: npt.NDArray[np.float64] = gradient_norm
        self.update_rms: npt.NDArray[np.float64] = update_rms
        self.parameter_rms: npt.NDArray[np.float64] = parameter_rms
        self.unchanged: npt.NDArray[np.float64] = unchanged / np.maximum(size, 1)
        self.not_finite: npt.NDArray[np.int64] = not_finite.astype(np.int64)
        self.size: npt.NDArray[np.int64] = size.astype(np.int64)

    def total(self) -> dict[str, float]:
        """The measures of all variables together."""
        size, total = self.size.astype(np.float64), max(float(self.size.sum()), 1.0)
        return {
            "gradient_norm": float(np.sqrt(np.square(self.gradient_norm).sum())),
            "update_rms": float(np.sqrt((np.square(self.update_rms) * size).sum() / total)),
            "parameter_rms": float(np.sqrt((np.square(self.parameter_rms) * size).sum() / total)),
            "unchanged": float((self.unchanged * size).sum() / total),
            "not_finite": int(self.not_finite.sum()),
        }

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """All measures under flat keys, for ``wandb.log`` or TensorBoard: "update_rms", "update_rms/w" of variable w.

        Args:
            prefix: Put before every key.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: {shown(prefix, 60)}, expected a string")
        flat = {f"{prefix}{measure}": value for measure, value in self.total().items()}
        for measure in _MEASURES:
            column = getattr(self, measure).tolist()
            flat.update({f"{prefix}{measure}/{name}": value for name, value in zip(self.names, column, strict=True)})
        return flat

    def __repr__(self) -> str:
        """The measures of all variables together."""
        return f"Telemetry({', '.join(f'{measure}={value:.6g}' for measure, value in self.total().items())})"
