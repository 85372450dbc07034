"""``fastadam.AdamW``: Adam whose weights decay unless it is told otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastadam._core.adam import Adam
from fastadam._core.keywords import ELSEWHERE, suggests_keywords

if TYPE_CHECKING:
    from fastadam._core.types import Hyperparameter, LearningRate

__all__ = ["AdamW"]


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), with Keras 3's arguments.

    The decay is multiplied by the learning rate, as in Keras and PyTorch and unlike the paper.

    Args:
        learning_rate: As in :class:`Adam`.
        weight_decay: A variable with a gradient shrinks by ``weight_decay * learning_rate`` before the update.
        beta_1: As in :class:`Adam`, like all that follow.
        beta_2: Decay rate of the second moment.
        epsilon: Added to the square root.
        amsgrad: Use the maximum of the second moments.
        name: Name of the optimizer.
        clipnorm: Scale each gradient down to this norm.
        clipvalue: Clip the elements of gradients.
        global_clipnorm: Scale all gradients down to this norm of all together.
        lr: Another name of ``learning_rate``.
        decay: The learning rate is divided by ``1 + decay * iterations``.
        use_ema: Keep a moving average of each variable.
        ema_momentum: Decay rate of the averages.
        ema_overwrite_frequency: Overwrite the variables with their averages every so many steps.
        loss_scale_factor: Divide the gradients by this number.
        gradient_accumulation_steps: Update the variables in every such call only.
        sparse_update: How :class:`fastadam.IndexedSlices` are applied.
        max_staleness: The most steps that a row of a deferred table waits.
        clip_after_dedupe: Clip the summed rows of IndexedSlices.

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
        )
