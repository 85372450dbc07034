"""``overlap``: the step of each parameter while the backward pass goes on."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadam._core.common.checks import check_number
from fastadam.torch._optimizer import Adam, check_begin, stepper_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam.torch._step import OpenStep

__all__ = ["Overlap", "overlap"]


class Overlap:
    """Steps parameters on a background thread as their gradients are accumulated; made by :func:`overlap`.

    >>> import importlib.util
    >>> if importlib.util.find_spec("torch"):
    ...     import torch, fastadam.torch
    ...     model = torch.nn.Linear(4, 1)
    ...     opt = fastadam.torch.AdamW(model.parameters())
    ...     attached = fastadam.torch.overlap(opt).attach()
    ...     for _ in range(2):
    ...         opt.zero_grad()
    ...         model(torch.ones(2, 4)).square().sum().backward()
    ...         opt.step()
    ...     attached.detach()
    """

    def __init__(self, optimizer: Adam, bucket_mb: float | None, threads: int | None, loss_scale: float) -> None:
        if bucket_mb is None:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            bucket_mb = min(25.0, sum(param.numel() * param.element_size() for param in params) / 16 / 2**20)
        self._optimizer, self._bytes = optimizer, bucket_mb * 2**20
        self._threads, self._loss_scale = threads, loss_scale
        self._waiting: list[Tensor] = []
        self._size = 0.0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._step: OpenStep | None = None
        self._seen: set[Tensor] = set()  # parameters whose gradients are complete
        self._is_attached = False

    def __enter__(self) -> Self:
        """Begin the step of the backward passes in the block; the last of them must be the only one, or accumulate."""
        self._begin()
        self._add_hooks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()
        if error is not None:
            self._optimizer.abort_step()
            return
        self._finish()

    def attach(self) -> Self:
        """Have every backward pass begin a step, which ``optimizer.step()`` ends, until :meth:`detach`.

        For loops with one backward pass in each step. ``optimizer.zero_grad()`` drops a step that was not ended.
        """
        if self._is_attached:
            raise RuntimeError("attach: already attached, expected detach() first")
        stepper = stepper_of(self._optimizer)
        if stepper.overlap is not None:
            raise RuntimeError("attach: another overlap() of this optimizer is attached, expected its detach() first")
        stepper.overlap = self
        self._is_attached = True
        self._add_hooks()
        return self

    def detach(self) -> None:
        """Remove the hooks; a step that was begun stays open."""
        for hook in self._hooks:
            hook.remove()
        if self._is_attached:
            stepper_of(self._optimizer).overlap = None
        self._hooks, self._is_attached = [], False

    @property
    def is_open(self) -> bool:
        """Whether a step that this has begun is open."""
        return self._step is not None and self._step.is_open and self._step is stepper_of(self._optimizer).open

    def step(self, grad_scale: object, found_inf: object) -> None:
        """What ``optimizer.step()`` does instead of a step."""
        if grad_scale is not None or found_inf is not None:
            self._optimizer.abort_step()
            raise RuntimeError(
                "grad_scale, found_inf: set by a GradScaler with overlap(...).attach(), expected "
                "overlap(..., loss_scale=...) and skip_nonfinite=True instead of the scaler"
            )
        self._finish()

    def _finish(self) -> None:
        self._waiting, self._size = [], 0.0
        if not self.is_open:
            raise RuntimeError(
                "overlap: the step was ended or dropped inside the block, expected no zero_grad(), end_step() or "
                "abort_step() there"
            )
        self._optimizer.end_step()

    def _begin(self) -> None:
        self._waiting, self._size, self._seen = [], 0.0, set()
        self._optimizer.begin_step(early=True, threads=self._threads, loss_scale=self._loss_scale)
        self._step = stepper_of(self._optimizer).open

    def _add_hooks(self) -> None:
        for group in self._optimizer.param_groups:
            params = group["params"]
            for param, copy in zip(params, group.get("compute_params") or [None] * len(params), strict=True):
                source = copy if copy is not None and copy.requires_grad else param
                if source.requires_grad:
                    self._hooks.append(source.register_hook(partial(self._before, param)))
                    self._hooks.append(source.register_post_accumulate_grad_hook(partial(self._take, param)))

    def _before(self, param: Tensor, _gradient: Tensor) -> None:
        """A gradient is about to be added to; only then can the step be undone."""
        if self.is_open and param in self._seen:
            self._optimizer.abort_step()
            raise RuntimeError(
                "overlap: a second backward pass in one step, which was undone; expected one, with all others before "
                "the block or before attach()"
            )

    def _take(self, param: Tensor, source: Tensor) -> None:
        """A gradient of a parameter, or of the ``compute_params`` tensor in its place, is complete."""
        if source is not param and (self.is_open or self._is_attached):
            gradient, source.grad = source.grad, None  # the next one must not be added to it
            if gradient is not None and gradient.dtype != param.dtype:
                param.grad_dtype = gradient.dtype  # it is read as it is
            param.grad = gradient
        self._note(param)

    def _note(self, param: Tensor) -> None:
        if not self.is_open:
            if not self._is_attached:
                return  # the block was left, and a signal handler has kept the hooks from being removed
            self._begin()
        self._waiting.append(param)
        self._seen.add(param)
        self._size += param.numel() * param.element_size()
        if self._size < self._bytes:
            return
        waiting, self._waiting, self._size = self._waiting, [], 0.0
        try:
            self._optimizer.step_bucket(waiting)
        except BaseException:
            self._optimizer.abort_step()
            raise


def overlap(
    optimizer: Adam, *, bucket_mb: float | None = None, threads: int | None = None, loss_scale: float = 1.0
) -> Overlap:
    """Step parameters on a background thread while the backward pass goes on.

    The result is that of ``backward()`` and ``optimizer.step()``, to the bit, with clipping and ``skip_nonfinite`` too:
    parameters are stepped as if nothing was clipped, and a log undoes that at the end if it was wrong. While most steps
    are clipped, none is made early. The log takes about 1.1 bytes for each parameter, more in the first steps.

    If tensors of ``compute_params`` require gradients, these are moved to the parameters, the masters.

    Parameters that something else than the backward pass reads or writes, and their gradients, must be left alone until
    the step ends. Only float32 parameters (or masters) with dense gradients in CPU memory are stepped early, others at
    the end.

    Args:
        optimizer: A :class:`fastadam.torch.Adam`.
        bucket_mb: Gradients are collected until there are so many megabytes of parameters; None for 25, or for a
            sixteenth of all parameters if that is less.
        threads: The most threads of the step; give the backward pass the others by ``torch.set_num_threads``.
        loss_scale: What the loss was multiplied by.

    Returns:
        A context manager around the backward pass, in the place of ``optimizer.step()``; or call its ``attach()``.

    Raises:
        TypeError: ``optimizer`` is not a :class:`fastadam.torch.Adam`, or another argument is not a number.
        ValueError: ``bucket_mb`` is below 0, or ``threads`` or ``loss_scale`` is not above 0.

    >>> import importlib.util
    >>> if importlib.util.find_spec("torch"):
    ...     import torch, fastadam.torch
    ...     model = torch.nn.Linear(4, 1)
    ...     opt = fastadam.torch.AdamW(model.parameters(), global_clipnorm=1.0)
    ...     loss = model(torch.ones(2, 4)).square().sum()
    ...     with fastadam.torch.overlap(opt):
    ...         loss.backward()
    """
    if not isinstance(optimizer, Adam):
        raise TypeError(f"optimizer: {type(optimizer).__name__}, expected a fastadam.torch.Adam or AdamW")
    if bucket_mb is not None and not check_number("bucket_mb", bucket_mb) >= 0:
        raise ValueError(f"bucket_mb: {bucket_mb}, expected None or a number of at least 0")
    return Overlap(optimizer, bucket_mb, *check_begin(threads, loss_scale))
