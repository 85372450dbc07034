"""``fastadam.AdamW``: Adam with weight decay by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from fastadam._core.adam import Adam
from fastadam._core.common.keywords import ELSEWHERE, suggests_keywords

if TYPE_CHECKING:
    from fastadam._core.common.types import Hyperparameter, LearningRate

__all__ = ["AdamW"]


class AdamW(Adam):
    r"""Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), with Keras 3's arguments.

    .. math:: \theta \leftarrow \theta (1 - \lambda \eta), \quad \text{then the update of Adam}

    The weight decay :math:`\lambda` is multiplied by the learning rate :math:`\eta`, as in Keras and PyTorch and unlike
    in the paper. Shapes, dtypes and errors are the same as for :class:`Adam`.

    Args:
        learning_rate: As for :class:`Adam`.
        weight_decay: Each variable with a gradient is multiplied by ``1 - weight_decay * learning_rate`` before the
            update.
        beta_1: Decay rate of the first moment.
        beta_2: Decay rate of the second moment.
        epsilon: Added to the square root of the second moment.
        amsgrad: Use the maximum of the second moments.
        name: Name of the optimizer.
        clipnorm: Scale each gradient down to this norm.
        clipvalue: Clip the elements of gradients to this absolute value.
        global_clipnorm: Scale the gradients down so that the norm over all of them is at most this.
        lr: Another name of ``learning_rate``.
        decay: The learning rate is divided by ``1 + decay * iterations``.
        use_ema: Keep a moving average of each variable.
        ema_momentum: Decay rate of the averages.
        ema_overwrite_frequency: Number of steps after which the averages overwrite the variables.
        loss_scale_factor: Divide the gradients by this number.
        gradient_accumulation_steps: Number of calls whose mean gradient makes one step.
        sparse_update: How :class:`fastadam.IndexedSlices` are applied: "dense", "deferred", "deferred_fast" or "lazy".
        max_staleness: Maximum number of steps that a row of a deferred table waits.
        clip_after_dedupe: Clip IndexedSlices after repeated rows are summed, not before.
        sum_repeated: Sum the gradients of a variable that is given more than once in a call.
        telemetry: Measure what every step does, for :meth:`telemetry`.
        moments: How m and v are stored: "float32", "bfloat16" or "8bit".
        master: "split" keeps the low 16 bits of the float32 values of bfloat16 variables.
        stochastic_rounding: Round bfloat16 variables at random.
        float32_for: Which variables keep float32 moments: a size, patterns of names, or a function.
        seed: Of the random rounding.

    Raises:
        ValueError: ``weight_decay`` is None; and all that :class:`Adam` raises.

    >>> import numpy as np, fastadam
    >>> w = np.array([2.0])
    >>> step = fastadam.AdamW(learning_rate=0.1, weight_decay=0.5).apply_gradients([(np.zeros(1), w)])
    >>> w
    array([1.9])
    """

    @suggests_keywords("optimizer", ELSEWHERE)
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        weight_decay: float = 0.004,
        beta_1: Hyperparameter = 0.9,
        beta_2: Hyperparameter = 0.999,
        epsilon: Hyperparameter | None = 1e-7,
        amsgrad: bool = False,
        name: str | None = "AdamW",
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        lr: LearningRate | None = None,
        decay: Hyperparameter = 0.0,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        sparse_update: Literal["dense", "deferred", "deferred_fast", "lazy"] = "dense",
        max_staleness: int | None = None,
        clip_after_dedupe: bool = False,
        sum_repeated: bool = False,
        telemetry: bool = False,
        moments: Literal["float32", "bfloat16", "8bit"] | None = None,
        master: Literal["split"] | None = None,
        stochastic_rounding: bool = False,
        float32_for: int | Sequence[str] | Callable[[str, tuple[int, ...]], bool] | None = None,
        seed: int = 0,
    ) -> None:
        if weight_decay is None:
            raise ValueError("Argument `weight_decay` must be a float. Received: weight_decay=None")
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            amsgrad,
            name,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            lr=lr,
            decay=decay,
            weight_decay=weight_decay,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            sparse_update=sparse_update,
            max_staleness=max_staleness,
            clip_after_dedupe=clip_after_dedupe,
            sum_repeated=sum_repeated,
            telemetry=telemetry,
            moments=moments,
            master=master,
            stochastic_rounding=stochastic_rounding,
            float32_for=float32_for,
            seed=seed,
        )
