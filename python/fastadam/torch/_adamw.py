"""``fastadam.torch.AdamW``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fastadam._core.common.keywords import suggests_keywords
from fastadam.torch._optimizer import ELSEWHERE, Adam

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.optim.optimizer import ParamsT, StateDict

    from fastadam.torch._formats import Master, Moments

__all__ = ["AdamW"]


class AdamW(Adam):
    r"""Adam with decoupled weight decay: :class:`Adam` with ``decoupled_weight_decay``, as ``torch.optim.AdamW``.

    .. math:: \theta \mathrel{-}= \gamma \lambda \theta, \quad \text{then Adam's step}

    Arguments and errors are the same as for :class:`Adam`. After loading the state of an Adam it is still an AdamW.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101).

    >>> import importlib.util
    >>> if importlib.util.find_spec("torch"):
    ...     import torch, fastadam.torch
    ...     opt = fastadam.torch.AdamW([torch.nn.Parameter(torch.ones(2))])
    ...     assert opt.param_groups[0]["weight_decay"] == 0.01
    """

    @suggests_keywords("optimizer", ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        sparse_update: Literal["dense", "deferred", "deferred_fast", "lazy"] = "dense",
        moments: Moments | None = None,
        master: Master | None = None,
        stochastic_rounding: bool = False,
        float32_for: int | Callable[[str, tuple[int, ...]], bool] | Iterable[str] | None = None,
        seed: int = 0,
        clipvalue: float | None = None,
        clipnorm: float | None = None,
        global_clipnorm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = False,
        telemetry: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            sparse_update=sparse_update,
            moments=moments,
            master=master,
            stochastic_rounding=stochastic_rounding,
            float32_for=float32_for,
            seed=seed,
            clipvalue=clipvalue,
            clipnorm=clipnorm,
            global_clipnorm=global_clipnorm,
            skip_nonfinite=skip_nonfinite,
            master_weights=master_weights,
            telemetry=telemetry,
        )

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
