"""``fastadam.torch.Adam``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastadam._core.common.checks import check_bool, check_number
from fastadam._core.common.frameworks import named_in_keras
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import Foreign
from fastadam._core.native.buckets import check_threads
from fastadam._core.native.slices import DEFERRED, check_sparse_update
from fastadam._core.native.worker import Handle
from fastadam.torch import _resizing
from fastadam.torch._attached import AttachedParameter, attach_to, inside
from fastadam.torch._buckets import BucketedStep
from fastadam.torch._checks import (
    OfGroups,
    check_closure,
    check_kinds,
    check_module,
    check_numbers,
    check_options,
    check_params,
    check_rows,
    check_tensor,
    refuse_options_of_optimizer,
)
from fastadam.torch._clipping import Clipping
from fastadam.torch._compiled import Columns, traced_step
from fastadam.torch._copies import ComputeParams, check_compute_params, check_groups_apart
from fastadam.torch._formats import Float32Rule, check_formats, fill_seed, given_formats, master_of
from fastadam.torch._loading import check_is_dict, fill_groups, keep_tensors, restore_states
from fastadam.torch._options import Options
from fastadam.torch._step import GroupStepper
from fastadam.torch._synced_states import SyncedStates

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT, StateDict

    from fastadam._core.common.telemetry import Telemetry
    from fastadam._core.common.types import AnyArray, ArrayLike, SparseUpdate
    from fastadam.torch._checks import Group, ParamState
    from fastadam.torch._formats import Master, Moments

__all__ = ["ELSEWHERE", "Adam", "stepper_of"]

Loss = TypeVar("Loss")

ELSEWHERE = {
    "use_ema": "torch.optim.swa_utils.AveragedModel keeps averages",
    "ema_momentum": "torch.optim.swa_utils.AveragedModel keeps averages",
    "loss_scale_factor": "torch.amp.GradScaler scales the loss",
}


@named_in_keras
class Adam(torch.optim.Optimizer):
    r"""Adam, AMSGrad and, with ``decoupled_weight_decay``, AdamW, for parameters of PyTorch.

    .. math::
        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \mathrel{-}= \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    A drop-in for ``torch.optim.Adam``: it takes the same arguments, groups and hooks, and state dicts go both ways.
    Parameters may be float32, float64, bfloat16, float16 or complex, of any strides.

    With a GradScaler it behaves as torch's optimizers do. Without ``fused`` the scaler unscales the gradients and does
    not call ``step`` if some are not finite. With ``fused=True`` it always calls ``step`` (and so its hooks), which
    reads ``optimizer.grad_scale`` and ``optimizer.found_inf``, changes nothing if some gradients are not finite, and
    otherwise leaves the gradients unscaled. The scaler takes float16 gradients only with ``fused=True``.

    On a GPU with ``fused`` or ``capturable``, ``step`` is counted on the GPU, which also reads what a GradScaler found.
    The host waits only for a first step, after something else or a graph may have written to ``step``, and if the betas
    have changed since the first step. A step with infinite gradients then changes nothing, not even ``step``. Without
    the two flags the host waits for the scaler; under ``torch.compile`` it also waits for ``step``.

    Two differences from torch follow from the order of operations, which is TensorFlow's. A gradient whose square
    overflows (1.9e19 in float32) makes the second moment infinite and, in the next step, NaN; in torch it stays
    infinite. A ``beta_2`` below 1e-3 keeps rounding errors of large squares: a relative error of ``1e-7 / beta_2`` in
    a much smaller square that follows.

    Sparse COO gradients, as from ``nn.Embedding(sparse=True)``, may be coalesced or not. ``sparse_update`` says what a
    step does with them:

    - "dense": what ``torch.optim.Adam`` does with their ``to_dense()``.
    - "lazy": only the rows in the gradient move, as with ``torch.optim.SparseAdam``.
    - "deferred": every row gets the bits of dense steps, in the time of "lazy". Rows are brought up to date when a step
      touches them, and when PyTorch reads the weight of an attached module (:meth:`attach`). Without :meth:`attach`
      read rows through :meth:`gather`, and call :meth:`sync` before the parameter is read or written in any other way:
      the next call then refuses a write that was made while rows waited, but does not notice one through ``.data``.
      Reads of ``state`` find all rows up to date. A write to a moment that was read before the rows waited is refused,
      too. Writes through ``.numpy()`` are never noticed: the waiting steps then use what was written.
    - "deferred_fast": like "deferred", but the steps that a row missed are summed in closed form.

    Except with "dense", epsilon means what it means in SparseAdam and Keras for parameters with sparse gradients: it is
    added to :math:`\sqrt v` before the bias correction.

    Gradients of any dtype and layout can be clipped, and steps skipped, and the gradients themselves stay as they are.
    Elements are clipped first, of a complex gradient the real and the imaginary parts; then the norm of each gradient
    or of all. Bounds are for unscaled gradients, also with ``fused`` and a GradScaler. A sparse gradient with repeated
    indices counts as its ``coalesce()``. The norm of all gradients is that of all groups, and that of a DTensor is the
    norm of the whole tensor; if one process skips a step, all do. Plain tensors beside DTensors must have the same
    gradients in all processes. Shards that are not DTensors, as in FSDP1, are not known as such: there the gradients
    must be clipped before the step. The four options belong to the optimizer, not to
    its groups: they can be set as attributes at any time, and are copied and pickled but not part of state dicts.
    Parameters on a GPU are refused with them.

    Learning rate schedulers, and ``step_was_skipped`` of Accelerate, only see whether ``step`` was called, not that it
    changed nothing. Write ``if not optimizer.last_step_skipped: scheduler.step()``.

    Two ways to keep float32 parameters for a model that computes in half precision; both write the rounded values (to
    nearest even) in the pass that steps the float32 ones, in CPU memory, for dense gradients and for sparse ones with
    "dense" or "lazy":

    - A group ``{"params": [...], "compute_params": [...]}`` has for each float32 parameter None or a tensor of
      bfloat16, float16 or float32 that receives its value after every step that moves it. These tensors are the
      caller's: they are copied and pickled with the optimizer, and not part of state dicts. A gradient of a half type
      (``parameter.grad_dtype = torch.bfloat16``) is read as it is.
    - With ``master="float32"`` bfloat16 and float16 parameters are the rounded values, and the optimizer owns the
      float32 ones, ``state[parameter]["master"]``, with float32 moments. They begin as the parameter. What is written
      to a parameter between steps, as by ``load_state_dict`` of the model, becomes the master's value wherever the
      master does not round to it, so that a checkpoint of both goes on to the bit in whatever order it is loaded.
      Writes through ``parameter.data`` are not noticed: the next step overwrites them. A state dict without masters, as
      of ``torch.optim.AdamW``, may be loaded: masters are then made of the parameters. torch's optimizers ignore the
      key.

    Smaller states, for float32, bfloat16 and float16 parameters in CPU memory with dense gradients:

    - ``moments="bfloat16"`` (4 bytes for each parameter) and ``moments="8bit"`` (2 bytes; 128 elements share a scale)
      are rounded stochastically, which keeps their means. ``float32_for`` says which parameters keep float32 moments.
      A parameter whose first gradient is sparse keeps them too; a sparse gradient that comes later is refused, and so
      are 8-bit moments with ``amsgrad`` and of DTensors. float64 and complex parameters keep moments of their dtype.
    - ``master="split"`` (2 bytes) keeps the low half of float32 masters whose high half is the bfloat16 parameter:
      ``state[parameter]["master_low"]``. The parameter is then rounded to nearest, with ties away from zero. What is
      written to a parameter becomes the high half of its master. A parameter whose first gradient is sparse has a
      float32 master.
    - ``stochastic_rounding`` rounds bfloat16 parameters so that they move as far as float32 ones in the mean, without a
      master.

    The random bits derive from ``seed``, the step, the number of the parameter in the groups and the element, whatever
    the threads and the instruction set: a run that is resumed goes on to the bit. Elements of a DTensor are counted in
    the shard of the process, so that they differ for other shards. A state dict in any of these formats, or of
    ``torch.optim``, may be loaded into an optimizer with any other: it is converted. ``torch.compile`` breaks the graph
    at a step with these options.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Step size; a number or a tensor of one element.
        betas: Decay rates of the moments, in [0, 1); numbers or tensors.
        eps: Added to the root of the corrected second moment.
        weight_decay: The parameter times this is added to the gradient; or see ``decoupled_weight_decay``.
        amsgrad: Divide by the root of the largest second moment so far.
        foreach: Selects no other kernels: every step takes all parameters at once. Refused by the first step if
            parameters of a group share memory, which torch then updates in an order that depends on the device.
        maximize: Maximize the objective instead of minimizing it.
        capturable: Allow CUDA graphs: ``step`` is counted on the GPU. Each replay reads ``grad_scale``, ``found_inf``
            and, if it is a tensor on the GPU, ``lr``.
        differentiable: Refused if True.
        fused: Have a GradScaler leave skipping and unscaling to ``step``; on a GPU also count ``step`` there. The
            kernels are the same. As in torch, with ``fused`` or ``foreach`` a group raises all of its step counts
            before its first parameter moves, which matters if parameters share a count.
        decoupled_weight_decay: Shrink the parameters by ``lr * weight_decay`` instead (AdamW).
        sparse_update: "dense", "deferred", "deferred_fast" or "lazy", for all groups; loading a state dict does not
            change it.
        moments: "float32", "bfloat16" or "8bit" moments; None for the parameter's dtype. Like the next two and ``seed``
            it is an option of groups; a group's ``moments`` and ``master`` are for states that begin, and must stay.
        master: "float32" to keep float32 masters of bfloat16 and float16 parameters, "split" to keep the low halves of
            masters whose high halves are bfloat16 parameters; None for none. Other parameters are stepped as usual.
        stochastic_rounding: Round bfloat16 parameters stochastically, without a master.
        float32_for: Which parameters keep float32 moments when ``moments`` are smaller: those with fewer elements than
            a number, those for which a function of the name and the shape is true, or those whose name one of some
            regular expressions finds. None stands for 4096. Parameters whose first gradient is sparse always do.
        seed: Of stochastic rounding, from 0 to 2**64 - 1.
        clipvalue: Each element of the gradients is clipped to ``[-clipvalue, clipvalue]``; None for no bound.
        clipnorm: Each gradient is scaled to at most this Euclidean norm; None for no bound.
        global_clipnorm: All gradients are scaled alike, so that their joint norm is at most this; None for no bound.
        skip_nonfinite: A step changes nothing, not even step counts, if an element of a gradient, or a norm that is to
            be clipped, is infinite or NaN; :attr:`last_step_skipped` says so.
        master_weights: True means ``master="float32"``.
        telemetry: Measure in every step what it does to each parameter, for :meth:`telemetry`. Gradients must be dense
            and on the CPU.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range, or two options exclude each other.

    Source: Kingma and Ba, "Adam" (arXiv:1412.6980); Loshchilov and Hutter (arXiv:1711.05101) for AdamW;
    https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html.

    >>> import importlib.util
    >>> if importlib.util.find_spec("torch"):
    ...     import torch, fastadam.torch
    ...     weight = torch.nn.Parameter(torch.ones(2))
    ...     opt = fastadam.torch.Adam([weight], lr=0.1)
    ...     weight.sum().backward()
    ...     opt.step()
    ...     assert torch.allclose(weight, torch.full((2,), 0.9))

    The exact float32 master of bfloat16 parameters, and moments of 8 bits: 6 bytes for each parameter.

    >>> if importlib.util.find_spec("torch"):
    ...     model = torch.nn.Linear(64, 64).bfloat16()
    ...     opt = fastadam.torch.AdamW(model.named_parameters(), moments="8bit", master="split", float32_for=["bias"])
    ...     model(torch.ones(1, 64).bfloat16()).sum().backward()
    ...     opt.step()
    ...     assert opt.state[model.weight]["exp_avg"].dtype == torch.uint8
    ...     assert opt.state[model.weight]["master_low"].dtype == torch.int16
    ...     assert opt.state[model.bias]["exp_avg"].dtype == torch.float32
    """

    lr: OfGroups = OfGroups("lr")
    learning_rate: OfGroups = OfGroups("lr")
    betas: OfGroups = OfGroups("betas")
    eps: OfGroups = OfGroups("eps")
    weight_decay: OfGroups = OfGroups("weight_decay")
    amsgrad: OfGroups = OfGroups("amsgrad")
    maximize: OfGroups = OfGroups("maximize")
    moments: OfGroups = OfGroups("moments")
    master: OfGroups = OfGroups("master")
    stochastic_rounding: OfGroups = OfGroups("stochastic_rounding")
    seed: OfGroups = OfGroups("seed")
    _step_supports_amp_scaling: bool  # as in torch only with `fused`: GradScaler hands over grad_scale and found_inf

    @suggests_keywords("optimizer", ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
        check_sparse_update(sparse_update)
        clipping = Clipping.of(clipvalue, clipnorm, global_clipnorm, skip_nonfinite)
        self._options = Options(sparse_update, [], clipping, telemetry, Float32Rule(float32_for))
        self._stepper = GroupStepper(self._options)
        check_kinds(lr, betas, eps, weight_decay)
        for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if isinstance(value, Tensor):
                check_tensor(name, value, foreach=bool(foreach), capturable=capturable)
        check_numbers(lr, betas, eps, weight_decay)
        check_options({"differentiable": differentiable})
        for name, value in (("foreach", foreach), ("fused", fused)):
            if value is not None:
                check_bool(name, value)
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        defaults = {
            "lr": lr,
            "betas": tuple([beta.squeeze() if isinstance(beta, Tensor) else beta for beta in betas]),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            **given_formats(moments, master_of(master, master_weights), stochastic_rounding, seed),
        }
        check_formats(defaults, sparse_update)
        super().__init__(check_params(params), defaults)
        self._sync_reads()
        self._options.float32_rule.check_use(self.param_groups)
        if fused:
            self._step_supports_amp_scaling = True

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss, with gradients enabled.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: A gradient or a state has the wrong dtype.
            ValueError: A gradient, a state or an option cannot be used.
            RuntimeError: Tensors are on devices that cannot be used, or a table was written to or left the groups while
                rows waited for their steps. A step that raises has changed nothing.
        """
        loss = None
        if closure is not None:
            check_closure(closure)
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        stepper = self._stepper
        if not torch.compiler.is_compiling():
            with stepper.lock:
                if stepper.overlap is not None and stepper.overlap.is_open:
                    stepper.overlap.step(grad_scale, found_inf)
                    return loss
                if stepper.open is not None:
                    stepper.require_closed("step")
                stepper.step(self.param_groups, self.state, grad_scale, found_inf)
            return loss
        if self._options.need_eager(self.param_groups):
            self._step_eagerly(grad_scale, found_inf)
            return loss
        traced = [Columns([], [], [], [], [], []) for _ in self.param_groups]
        are_traceable = [
            self._init_group(group, *columns) for group, columns in zip(self.param_groups, traced, strict=True)
        ]
        if not all(are_traceable):
            self._step_eagerly(grad_scale, found_inf)
            return loss
        with torch.no_grad():
            for index, group in enumerate(self.param_groups):
                if traced[index].params:
                    traced_step(index, group, traced[index], grad_scale, found_inf, stepper.compiled.number)
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[..., Foreign]) -> Callable[..., Foreign]:
        """What torch puts in place of ``step`` for hooks and profilers; without any it calls ``step`` alone.

        torch's own wrapper takes longer than the step of a small parameter.
        """
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: Adam, *args: object, **kwargs: object) -> Foreign:
            if (
                torch.compiler.is_compiling()  # first, as the profiler cannot be asked in a trace
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.autograd._profiler_enabled()
            ):
                return hooked(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    @torch._disable_dynamo
    def _step_eagerly(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The step where ``torch.compile`` breaks the graph."""
        with self._stepper.lock:
            self._stepper.step(self.param_groups, self.state, grad_scale, found_inf)

    def _init_group(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        """Fill the lists for ``torch.compile``, which calls this while it traces; new states are the optimizer's.

        Returns:
            False, with empty lists, if only an eager step can use the gradients or say what is wrong.
        """
        columns = Columns(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        return columns.fill(group, self.param_groups, self.state, self._options)

    @property
    def sparse_update(self) -> SparseUpdate:
        """How sparse gradients are applied; see the class."""
        return self._options.sparse_update

    @property
    def master_weights(self) -> bool:
        """Whether half parameters have float32 masters unless their group says otherwise; see the class."""
        return bool(self.defaults.get("master") == "float32")

    def telemetry(self) -> Telemetry:
        """What the last step did to each parameter that had a gradient: ``telemetry=True`` in the constructor.

        Parameters are in the order of the groups; a parameter without a name is called by its group and its place
        there, as "0.1". With masters the report is about them, and ``unchanged`` about the parameters, their copies. A
        complex parameter counts as its real and imaginary parts, a DTensor as the shard of this process. After a step
        that ``skip_nonfinite`` skipped, the report is about its gradients; a step that a GradScaler skips is not
        measured.

        Raises:
            RuntimeError: ``telemetry`` is off, or no step was made yet.

        >>> import importlib.util
        >>> if importlib.util.find_spec("torch"):
        ...     import torch, fastadam.torch
        ...     model = torch.nn.Linear(2, 1)
        ...     opt = fastadam.torch.AdamW(model.named_parameters(), lr=0.1, telemetry=True)
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     opt.step()
        ...     assert opt.telemetry().names == ["weight", "bias"]
        ...     assert opt.telemetry().to_dict()["gradient_norm/bias"] == 1.0
        """
        with self._stepper.lock:
            return self._stepper.telemetry(self.param_groups, self.state)

    # ---- steps in buckets ------------------------------------------------------------------------------------------

    def begin_step(self, *, early: bool = False, threads: int | None = None, loss_scale: float = 1.0) -> None:
        """Begin a step whose parameters are given in buckets by :meth:`step_bucket`, until :meth:`end_step`.

        The result has the bits of :meth:`step`, whatever the buckets, their order and the threads that give them.
        Nothing is written before ``end_step`` unless ``early``: then each bucket is stepped at once on a background
        thread, as if no norm was clipped, and a log of about 1.1 bytes for each parameter undoes that if it was wrong.
        Only float32 parameters, and half ones with masters, whose gradients are dense are stepped early, and none with
        ``telemetry``. Gradients must stay as they are until ``end_step``.

        Args:
            early: Step buckets as they come; :func:`fastadam.torch.overlap` does so during the backward pass.
            threads: The most threads of the step; None for all.
            loss_scale: What the gradients are divided by.

        Raises:
            RuntimeError: A step is open.
            ValueError: A parameter comes twice; ``threads`` or ``loss_scale`` is not above 0.

        >>> import importlib.util
        >>> if importlib.util.find_spec("torch"):
        ...     import torch, fastadam.torch
        ...     weight, bias = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        ...     opt = fastadam.torch.Adam([weight, bias], lr=0.1, global_clipnorm=1.0)
        ...     (weight + bias).sum().backward()
        ...     opt.begin_step()
        ...     handles = [opt.step_bucket([bias]), opt.step_bucket([weight])]
        ...     opt.end_step()
        """
        check_bool("early", early)
        threads, scale = check_begin(threads, loss_scale)
        stepper = self._stepper
        with stepper.lock:
            stepper.require_closed("begin_step")
            stepper.calls.finish(self.state)
            stepper.open = BucketedStep(
                stepper, self.param_groups, self.state, early=early, threads=threads, loss_scale=scale
            )

    def step_bucket(self, params: Iterable[Tensor]) -> Handle[None]:
        """Give parameters whose gradients are complete, from any thread; those without a gradient are left out.

        Returns:
            A handle whose ``result()`` waits until the bucket needs no more work before the end of the step.

        Raises:
            RuntimeError: No step is open.
            ValueError: A parameter that is not the optimizer's, or that was given before; and all that :meth:`step`
                raises of gradients, unless nothing is done before the end: then :meth:`end_step` raises it. The bucket
                is not taken then, and the step stays open.
        """
        stepper = self._stepper
        with stepper.lock:
            return stepper.require_open("step_bucket").add(params)

    def end_step(self) -> None:
        """Make the step, of all parameters that have a gradient: those that no bucket had are stepped now.

        Raises:
            RuntimeError: No step is open; or a gradient has changed and the step has to be undone.
        """
        stepper = self._stepper
        with stepper.lock:
            stepper.require_open("end_step").finish()
            stepper.open = None

    def abort_step(self) -> None:
        """Undo what the open step has made, to the bit, and close it; without an open step nothing happens."""
        stepper = self._stepper
        with stepper.lock:
            if stepper.open is not None:
                try:
                    stepper.open.abort()
                finally:
                    stepper.open = stepper.open if stepper.open.is_open else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; an open step, whose gradients these are, is undone first."""
        check_bool("set_to_none", set_to_none)
        self.abort_step()
        with inside() if self._options.attached else nullcontext():
            super().zero_grad(set_to_none)

    # ---- clipping --------------------------------------------------------------------------------------------------

    @property
    def clipvalue(self) -> float | None:
        """The bound of each element of the gradients; None for none. May be set."""
        return self._options.clipping.clipvalue

    @clipvalue.setter
    def clipvalue(self, bound: float | None) -> None:
        self._set_clipping(clipvalue=bound)

    @property
    def clipnorm(self) -> float | None:
        """The bound of the norm of each gradient; None for none. May be set."""
        return self._options.clipping.clipnorm

    @clipnorm.setter
    def clipnorm(self, bound: float | None) -> None:
        self._set_clipping(clipnorm=bound)

    @property
    def global_clipnorm(self) -> float | None:
        """The bound of the norm of all gradients together; None for none. May be set."""
        return self._options.clipping.global_clipnorm

    @global_clipnorm.setter
    def global_clipnorm(self, bound: float | None) -> None:
        self._set_clipping(global_clipnorm=bound)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step with gradients that are not finite changes nothing. May be set."""
        return self._options.clipping.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, skips: bool) -> None:
        self._set_clipping(skip_nonfinite=skips)

    def _set_clipping(self, **options: object) -> None:
        with self._stepper.lock:
            self._stepper.require_closed(next(iter(options)))
            self._options.clipping.set(**options)
            self._stepper.forget_numbers()

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step changed nothing because gradients were not finite; False before any step.

        Either ``skip_nonfinite`` or, with ``fused``, a GradScaler has skipped it. Without ``fused`` the scaler does not
        call ``step`` at all, and this property stays as it was. Reading it waits for the GPU if the scaler's result is
        still there.

        >>> import importlib.util
        >>> if importlib.util.find_spec("torch"):
        ...     import torch, fastadam.torch
        ...     weight = torch.nn.Parameter(torch.ones(2))
        ...     opt = fastadam.torch.Adam([weight], lr=0.1, skip_nonfinite=True)
        ...     scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1)
        ...     (weight.sum() * float("nan")).backward()
        ...     opt.step()
        ...     if not opt.last_step_skipped:
        ...         scheduler.step()
        ...     assert opt.last_step_skipped and weight.tolist() == [1.0, 1.0] and scheduler.get_last_lr() == [0.1]
        """
        skipped = self._stepper.compiled.skipped
        return skipped if isinstance(skipped, bool) else skipped.skips

    # ---- tables ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sync(self, param: Tensor | None = None) -> None:
        """Bring every row of a parameter, or of all, up to date.

        In a deferred mode call it before a parameter is read or written that is not the weight of an attached module.
        The next call notices writes to parameters and moments, except through ``.data`` and ``.numpy()``. After a write
        that it refuses, ``del optimizer.state[parameter]`` begins anew, without the steps that rows wait for.

        Raises:
            RuntimeError: A parameter or a moment was written to, or replaced by a copy of itself, while rows waited for
                their steps.
        """
        with self._stepper.lock:
            self._stepper.catch_up(self.state, param)

    @torch.no_grad()
    def gather(self, param: Tensor, ids: Tensor) -> Tensor:
        """A copy of the rows ``param[ids]`` after all steps so far; ``param`` has them up to date then, too.

        Args:
            param: A parameter.
            ids: Integers of any shape, repeated or not.

        Raises:
            TypeError: ``ids`` are not integers.
            ValueError: An id that is not a row.
        """
        rows = check_rows(param, ids)
        with self._stepper.lock:
            self._stepper.catch_up(self.state, param, rows)
            return param.detach()[ids]

    def attach(self, module: torch.nn.Module) -> None:
        """Bring rows of the weight of ``module``, an Embedding or EmbeddingBag, up to date whenever PyTorch reads them.

        In a deferred mode the weight becomes a subclass of ``torch.nn.Parameter``. What an embedding looks up are rows;
        every other function reads all: copies, files, state dicts, averages, ``weight.detach()``, ``weight @ x``. A
        write, too, is made after the steps that rows wait for. A copy of the module or the weight belongs to no
        optimizer, unless the optimizer is copied or pickled with it. ``torch.compile`` keeps lookups in the graph and
        breaks it where all rows are read.

        A few functions of C++ do not say that they read a tensor: call :meth:`sync` before ``torch.tensor(weight)``,
        ``torch.asarray(weight, ...)``, ``torch.as_tensor`` with another dtype, ``torch.utils.dlpack.to_dlpack``,
        ``torch.nested.nested_tensor``, TorchScript, and ``torch.func.grad`` or ``functionalize`` of a function of the
        weight itself. NumPy arrays and DLPack capsules share the memory: those made before a step show rows that wait,
        and writes through them are not noticed. Attach the module again when it has got another weight.

        Raises:
            TypeError: Another kind of module; or, in a deferred mode, a weight of another subclass of ``Parameter``.
            ValueError: Its weight is not a parameter of this optimizer; or, in a deferred mode, it has ``max_norm``,
                which writes to rows that may wait.

        Warns if the module makes dense gradients (``sparse=False``), whose steps move every row.

        >>> import importlib.util
        >>> if importlib.util.find_spec("torch"):
        ...     import torch, fastadam.torch
        ...     words = torch.nn.Embedding(1000, 4, sparse=True)
        ...     opt = fastadam.torch.Adam(words.parameters(), sparse_update="deferred")
        ...     opt.attach(words)
        ...     for ids in ([1, 2], [2, 3]):
        ...         opt.zero_grad()
        ...         words(torch.tensor(ids)).square().sum().backward()
        ...         opt.step()
        """
        check_module(module, self.param_groups, self._options.sparse_update)
        if self._options.sparse_update in DEFERRED:
            attach_to(module.weight, self._before_read)
            if all(module.weight is not param for param in self._options.attached):
                self._options.attached.append(module.weight)

    @torch.no_grad()
    def _before_read(self, param: Tensor, rows: AnyArray | None) -> None:
        """Bring rows of an attached parameter, or all, up to date, unless it is this optimizer that reads them."""
        stepper = self._stepper
        if not stepper.is_busy:
            with stepper.lock:
                stepper.catch_up(self.state, param, rows)

    # ---- parameters that change ------------------------------------------------------------------------------------

    @torch.no_grad()
    def resize(self, old: Tensor, new: Tensor, rows: ArrayLike | None = None) -> None:
        """Let a parameter of another length take the place of one: rows keep their moments, new rows start fresh.

        ``new`` comes where ``old`` is in the groups, with its name and its step count, so that the bias
        correction of fresh rows is that of the others. Their moments are zero, and their masters the values in
        ``new``. Values are not copied: ``new`` has them already, as from ``torch.cat``. In a deferred mode
        these must be the rows as they are in the memory of ``old`` at the time of the call: copy them right
        before it, and change them after it. Rows that wait for steps go on waiting in ``new``. 8-bit moments
        are decoded and rounded anew, which changes them only where blocks of 128 elements change.

        A tensor of ``compute_params`` is replaced by a new one with the rounded values of ``new``: the model has to
        take it from the group. A module that is attached stays so when it gets ``new`` as its weight. Nothing of
        ``old`` is kept.

        Args:
            old: A parameter of this optimizer.
            new: A leaf of the same dtype, device and shape but for its first axis. It may be ``old`` itself, with other
                ``data``, if no row waits.
            rows: For each row of ``new`` which row of ``old`` it was, or -1 if it is fresh; a row may come several
                times. None: the first rows are where they were.

        Raises:
            TypeError: ``rows`` are not integers; tensors that are distributed.
            ValueError: ``old`` is not a parameter of this optimizer, or ``new`` is one already; the dtype, device or
                shape differs; a number in ``rows`` is out of range; in a deferred mode, ``new`` and ``old`` differ in a
                row that steps have moved.
            RuntimeError: A step is open or captured in a CUDA graph, an overlap is attached, or ``old`` was written to
                while rows waited. A call that raises has changed nothing.

        >>> import importlib.util
        >>> if importlib.util.find_spec("torch"):
        ...     import torch, fastadam.torch
        ...     words = torch.nn.Embedding(2, 3, sparse=True)
        ...     opt = fastadam.torch.Adam(words.parameters(), sparse_update="deferred")
        ...     words(torch.tensor([1])).sum().backward()
        ...     opt.step()
        ...     opt.sync()
        ...     old = words.weight
        ...     words.weight = torch.nn.Parameter(torch.cat([old.detach(), torch.zeros(2, 3)]))
        ...     words.num_embeddings = 4
        ...     opt.resize(old, words.weight)
        ...     assert opt.state[words.weight]["exp_avg"].shape == (4, 3)
        """
        with self._stepper.lock, self._stepper.inside():
            _resizing.resize(self._held(), old, new, rows)

    @torch.no_grad()
    def forget(self, param: Tensor) -> None:
        """Drop a parameter: it leaves the groups with its state, after its rows have been brought up to date.

        Its group stays, perhaps empty. :meth:`add_param_group` takes it again, as a new one.

        Raises:
            ValueError: It is not a parameter of this optimizer.
            RuntimeError: As for :meth:`resize`.
        """
        with self._stepper.lock, self._stepper.inside():
            _resizing.forget(self._held(), param)

    @torch.no_grad()
    def reset(self, param: Tensor | None = None, rows: ArrayLike | None = None) -> None:
        """Set moments to zero in place, as before the first step: of a parameter, of some of its rows, or of all.

        Rows that wait for steps are brought up to date first. Masters stay: they are values. Without ``rows`` step
        counts become 0, too; with ``rows`` the parameter keeps its own, and with it the bias correction.

        Args:
            param: A parameter; None for all.
            rows: Integers of any shape, for the rows of ``param``; None for all.

        Raises:
            TypeError: ``rows`` are not integers.
            ValueError: It is not a parameter of this optimizer; a row out of range; ``rows`` without ``param``.
            RuntimeError: As for :meth:`resize`.

        >>> import importlib.util
        >>> if importlib.util.find_spec("torch"):
        ...     import torch, fastadam.torch
        ...     weight = torch.nn.Parameter(torch.ones(3, 1))
        ...     opt = fastadam.torch.Adam([weight])
        ...     weight.sum().backward()
        ...     opt.step()
        ...     opt.reset(weight, rows=[0, 2])
        ...     assert (opt.state[weight]["exp_avg"] != 0).ravel().tolist() == [False, True, False]
        """
        with self._stepper.lock, self._stepper.inside():
            _resizing.reset(self._held(), param, rows)

    def _held(self) -> _resizing.Held:
        return _resizing.Held(self._stepper, self._options, self.param_groups, self.state, self._before_read)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """The state dict of ``torch.optim.Adam``; every row of every table is brought up to date first.

        With ``master="float32"`` the state of a half parameter has a float32 ``master``, too, and float32 moments: with
        the masters as its parameters it is the state of a float32 model. ``compute_params`` are left out. 8-bit moments
        are ``exp_avg`` and ``exp_avg_sq`` of uint8 with ``exp_avg_scale`` and ``exp_avg_sq_scale``, one byte for 128
        elements in the order of memory; ``master_low`` is the int16 low half of a split master. torch's optimizers
        cannot use them: load the state into an optimizer with ``moments="float32"`` first.
        """
        with self._stepper.lock:
            self._stepper.require_closed("state_dict")
            self.sync()
            saved = super().state_dict()
            for group in saved["param_groups"]:
                group.pop("compute_params", None)
            return saved

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take clones of a state dict, from this class or from torch; moments of half parameters keep their dtype.

        The groups become the saved ones, except for ``foreach``, ``fused``, ``capturable`` and ``differentiable``,
        which keep their values, and for ``compute_params``, which stay. Rows that wait are brought up to date first,
        except in a parameter that has been written to since the last step: it is assumed to have been loaded.

        Raises:
            TypeError: An argument that is not a state dict; an option that is not a number; or a moment that is not a
                plain tensor of floating point numbers.
            ValueError: A different number or size of groups; a group or a state without what Adam keeps, as other
                optimizers save them; an option that no step would take; a moment that is sparse, has no data or has
                another shape than its parameter; or a step that is not a count. A call that raises leaves the optimizer
                unchanged.
        """
        with self._stepper.lock:
            self._stepper.require_closed("load_state_dict")
            check_is_dict(state_dict)
            self._stepper.calls.finish(self.state)
            self._stepper.tables.note_states(self.state)
            with torch.no_grad():
                for table in self._stepper.tables.of(None):
                    if table.is_untouched:
                        table.catch_up()
            before = self.__dict__.copy()
            last = self.register_load_state_dict_pre_hook(keep_tensors)
            try:
                super().load_state_dict(state_dict)
            except BaseException:
                self.__dict__.update(before)
                raise
            finally:
                last.remove()

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with their own values of the options or the defaults, and perhaps ``compute_params``."""
        if isinstance(param_group, dict):
            check_options(param_group)
            refuse_options_of_optimizer(param_group)
        super().add_param_group(param_group)
        try:
            check_formats(param_group, self._options.sparse_update)
            fill_seed(param_group, self.defaults.get("seed", 0))
            self._options.float32_rule.require_names(param_group)
            check_compute_params(param_group, len(self.param_groups) - 1, self._options.sparse_update)
            if any("compute_params" in group for group in self.param_groups):
                check_groups_apart(enumerate(self.param_groups))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if param_group.get("compute_params") is not None:
            param_group["compute_params"] = ComputeParams(param_group["compute_params"])

    def _sync_reads(self) -> None:
        """In a deferred mode, have reads of `state` bring rows up to date."""
        if self._options.sparse_update in DEFERRED:
            self.state: defaultdict[Tensor, ParamState] = SyncedStates(self._stepper, self.state)

    def __repr__(self) -> str:
        """Torch's text of the groups; then the options of the optimizer that are not the defaults."""
        groups: str = super().__repr__()
        given = [f"    {name}: {value}\n" for name, value in self._options.given().items()]
        return groups.removesuffix(")") + "".join(["All groups\n", *given] if given else []) + ")"

    def __getstate__(self) -> StateDict:
        self._stepper.require_closed("copy")
        self.sync()
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: StateDict) -> None:
        known = self.__dict__
        before, previous = known.get("param_groups", []), known.get("_stepper")
        super().__setstate__(state)
        self._stepper = GroupStepper(self._options, previous)
        self._sync_reads()
        for param in self._options.attached:
            if not isinstance(param, AttachedParameter):  # a copy
                attach_to(param, self._before_read)
        of_older = self._options.defaults_of_groups()
        for name, value in of_older.items():
            self.defaults.setdefault(name, value)
        saved = fill_groups(self.param_groups, before, of_older)
        restore_states(self.state, self.param_groups, self._options.state_format, saved)


def check_begin(threads: object, loss_scale: float) -> tuple[int | None, float]:
    """Arguments of ``begin_step``, checked, for :mod:`fastadam.torch._overlap` too."""
    scale = check_number("loss_scale", loss_scale)
    if not scale > 0:
        raise ValueError(f"loss_scale: {loss_scale}, expected a number above 0")
    return None if threads is None else check_threads("threads", threads), scale


def stepper_of(optimizer: Adam) -> GroupStepper:
    """What steps an optimizer, for :mod:`fastadam.torch._overlap`."""
    return optimizer._stepper
