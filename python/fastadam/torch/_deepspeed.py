"""``fastadam.torch.DeepSpeedCPUAdam``: the optimizer that ZeRO-Offload calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastadam._core.common.checks import check_bool
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.native.backend import _cpu
from fastadam.torch._checks import (
    Group,
    ParamState,
    check_closure,
    check_group,
    check_kinds,
    check_numbers,
    check_options,
    check_params,
    firsts_of,
    label_of,
)
from fastadam.torch._loading import check_is_dict, check_structure
from fastadam.torch._parameter_set import ParameterSet
from fastadam.torch._recorded import NO_FACTORS, UNCORRECTED, Part, Record, without_signals
from fastadam.torch._state import Kind, require_keys
from fastadam.torch._step_count import number_of, whole_count
from fastadam.torch._stored import HALF, SLOTS, Stored, stored_as

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT, StateDict

__all__ = ["DeepSpeedCPUAdam"]

Loss = TypeVar("Loss")

_SMALL, _MOST = 2**18, 4  # steps that can be undone of a subgroup of at most so many elements; of a larger one, one


class DeepSpeedCPUAdam(torch.optim.Optimizer):
    r"""AdamW, or Adam, with the arguments, methods and states of ``deepspeed.ops.adam.DeepSpeedCPUAdam``.

    .. math::
        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \mathrel{-}= \gamma \lambda \theta
            + \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Give it to ``deepspeed.initialize(optimizer=...)``. The configuration of ZeRO then needs
    ``"zero_force_ds_cpu_optimizer": false`` and ``"zero_allow_untested_optimizer": true``. Elsewhere it is an ordinary
    optimizer of parameters in CPU memory, but :class:`AdamW` repeats steps of many small ones faster.

    ``state[parameter]`` has ``step``, an int, ``exp_avg`` and ``exp_avg_sq``; state dicts of DeepSpeed's class can be
    loaded, and it loads these. A call that raises has changed nothing.

    Three differences: a rollback is exact; with ``fp32_optimizer_states=False`` the moments of bfloat16 parameters are
    rounded stochastically, which keeps their means; and ``amsgrad`` is supported.

    Args:
        model_params: Parameters or groups of them: float32, float64, bfloat16 or float16, in CPU memory when stepped.
        lr: Step size.
        bias_correction: Divide the moments by :math:`1 - \beta^t`; else by 1.
        betas: Decay rates of the moments, in [0, 1).
        eps: Added to the root of the corrected second moment.
        weight_decay: The :math:`\lambda` of AdamW; with ``adamw_mode=False`` it times the parameter is added to the
            gradient instead.
        amsgrad: Divide by the root of the largest second moment so far.
        adamw_mode: AdamW instead of Adam, for all groups.
        fp32_optimizer_states: Keep float32 moments of half parameters; False for moments of their dtype.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A number that is out of range.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101).

    >>> import importlib.util
    >>> if importlib.util.find_spec("torch"):
    ...     import torch, fastadam.torch
    ...     weight = torch.nn.Parameter(torch.ones(2))
    ...     opt = fastadam.torch.DeepSpeedCPUAdam([weight], lr=0.1)
    ...     weight.sum().backward()
    ...     opt.step_subgroup(0)
    ...     assert torch.allclose(weight, torch.full((2,), 0.9))
    ...     opt.rollback_subgroup(0)
    ...     assert weight.tolist() == [1.0, 1.0] and opt.state[0]["step"] == 0
    """

    @suggests_keywords("optimizer", {})
    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        check_kinds(lr, betas, eps, weight_decay)
        check_numbers(lr, betas, eps, weight_decay)
        flags = {
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
            "adamw_mode": adamw_mode,
            "fp32_optimizer_states": fp32_optimizer_states,
        }
        for name, value in flags.items():
            check_bool(name, value)
        self.adam_w_mode: bool = adamw_mode
        self.fp32_optimizer_states: bool = fp32_optimizer_states
        self._records: dict[Hashable, list[Record]] = {}  # by subgroup, the last step last
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
        }
        super().__init__(check_params(model_params), defaults)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss, with gradients enabled.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: A gradient or a state has the wrong dtype.
            ValueError: A gradient, a state or an option cannot be used.
            RuntimeError: A parameter is not in CPU memory.
        """
        loss = _evaluate(closure)
        with torch.no_grad():
            parts = [
                part
                for index, group in enumerate(self.param_groups)
                for part in self._parts_of(index, [i for i, p in enumerate(group["params"]) if p.grad is not None])
            ]

            def make() -> None:
                for part in parts:
                    part.make()
                    self.state.update(part.kept)

            if parts:
                without_signals(make)
        return loss

    def step_subgroup(self, subgroup_id: int, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Update the only parameter that has a gradient, with the state ``state[subgroup_id]``.

        :meth:`rollback_subgroup` can undo the last step of each subgroup, and the last four of one of at most 2**18
        elements. That takes about 1.1 bytes for each element of a float32 parameter, more in its first steps, and
        copies of all that a step reads and writes for other dtypes.

        Args:
            subgroup_id: Any number.
            closure: As for :meth:`step`.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: Several parameters have gradients; and as :meth:`step`.
        """
        loss = _evaluate(closure)
        with torch.no_grad():
            part = self._part_of(subgroup_id, "step_subgroup")
            if part is not None:
                without_signals(partial(self._make_recorded, subgroup_id, part))
        return loss

    def rollback_subgroup(self, sub_group_id: int, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Undo the last step of a subgroup, to the bit: the parameter, its moments and its step count.

        The parameter and its moments must have the values that the step gave them; they may have moved in memory. The
        gradient must be that of the step. Options that have changed since are not used.

        Args:
            sub_group_id: As for :meth:`step_subgroup`.
            closure: As for :meth:`step`.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: No step is left to undo, or the gradient, the parameter or its state has changed since.
        """
        _require_hashable("sub_group_id", sub_group_id)
        loss = _evaluate(closure)
        state = self.state.get(sub_group_id)
        if not state:
            raise RuntimeError(
                f"Cannot rollback optimizer state for sub_group_id {sub_group_id}: it has no state, expected "
                "step_subgroup() first"
            )
        if state["step"] <= 0:
            raise RuntimeError(
                f"Cannot rollback sub_group_id {sub_group_id}: step count is {state['step']}, expected 1 or more"
            )
        with torch.no_grad():
            part = self._part_of(sub_group_id, "rollback_subgroup")
            if part is None:
                return loss
            records = self._records.get(sub_group_id)
            if not records or records[-1].number != state["step"]:
                raise RuntimeError(
                    f"Cannot rollback sub_group_id {sub_group_id}: nothing is kept of step {state['step']}, expected "
                    "one of the last steps of this optimizer"
                )

            def undo() -> None:
                records[-1].undo(part)
                records.pop()

            without_signals(undo)
        return loss

    def _make_recorded(self, subgroup_id: int, part: Part) -> None:
        chosen = part.chosen
        log, before, gradient = None, [], None
        if chosen.is_plain and chosen.plan.can_undo(part.gradients):
            log = _cpu.StepLog()
            chosen.plan.step_logged(part.gradients, part.hyper, [], NO_FACTORS, log)
            part.note(part.counts)
        else:
            before = [tensor.clone() for tensor in part.written]
            gradient = chosen.params[0].grad.clone()
            part.make()
        self.state.update(part.kept)
        records = self._records.setdefault(subgroup_id, [])
        records.append(Record.of(part, log, before, gradient))
        del records[: -(_MOST if chosen.params[0].numel() <= _SMALL else 1)]

    # ---- parts of a step -------------------------------------------------------------------------------------------

    def _part_of(self, subgroup_id: int, method: str) -> Part | None:
        found = [
            (index, place)
            for index, group in enumerate(self.param_groups)
            for place, param in enumerate(group["params"])
            if param.grad is not None
        ]
        if not found:
            return None
        if len(found) > 1:
            raise ValueError(f"{method}: {len(found)} parameters with gradients, expected one, whose subgroup it is")
        index, place = found[0]
        return self._parts_of(index, [place], subgroup_id)[0]

    def _parts_of(self, index: int, places: list[int], subgroup_id: int | None = None) -> list[Part]:
        """The parameters at these places of a group, checked; nothing of the optimizer has changed yet."""
        group: Group = {**self.param_groups[index], "decoupled_weight_decay": self.adam_w_mode}
        check_group({"maximize": False, **group}, index)
        by_storage: dict[Stored, list[tuple[int, ParamState]]] = {}
        for place in places:
            param, label = group["params"][place], label_of(group, index, place)
            if not param.is_cpu:
                raise RuntimeError(f"{label}: on {param.device}, expected CPU memory, as with ZeRO's offload_optimizer")
            state = self._state_of(param if subgroup_id is None else subgroup_id, param, group, label)
            stored = stored_as(param, state, label, may_be_small=param.dtype == torch.bfloat16, rounds=False)
            by_storage.setdefault(stored, []).append((place, state))
        number = firsts_of(self.param_groups)[index] if subgroup_id is None else subgroup_id
        parts = []
        for stored, of in by_storage.items():
            params, labels = zip(*[(group["params"][i], label_of(group, index, i)) for i, _ in of], strict=True)
            kind = Kind("dense", False, bool(group["amsgrad"]), self.adam_w_mode, stored=stored)
            counts = [
                whole_count(number_of(s["step"], f"state of {n}"), n) for n, (_, s) in zip(labels, of, strict=True)
            ]
            # A set counts in tensors.
            steps = torch.tensor(counts, dtype=torch.float64).unbind()
            chosen = ParameterSet(
                list(params),
                [{**state, "step": step} for step, (_, state) in zip(steps, of, strict=True)],
                list(labels),
                [place for place, _ in of],
                kind,
                [],
                numbers=[number + place for place, _ in of] if stored.is_small else None,
            )
            corrected = group.get("bias_correction", True)
            hyper = chosen.numbers_of(group, counts[0] if corrected else UNCORRECTED, 1.0)
            read = chosen.read_gradients([param.grad for param in params], densify=hyper.l2 != 0)
            gradients = chosen.check(read, hyper, [], counts if corrected else None)
            keys: Sequence[Hashable] = params if subgroup_id is None else [subgroup_id]
            kept = [(key, state) for key, (_, state) in zip(keys, of, strict=True)]
            parts.append(Part(chosen, gradients, hyper, counts, kept))
        return parts

    def _state_of(self, key: Hashable, param: Tensor, group: Group, label: str) -> ParamState:
        """The state, or a new one, which is not the optimizer's yet."""
        _require_hashable("subgroup_id", key)
        state: ParamState = self.state.get(key) or {}
        if not state:
            dtype = torch.float32 if self.fp32_optimizer_states and param.dtype in HALF else param.dtype
            zeros = (torch.zeros_like(param, dtype=dtype, requires_grad=False) for _ in range(2))
            state = {"step": 0, **dict(zip((SLOTS["m"], SLOTS["v"]), zeros, strict=True))}
        require_keys(("step", SLOTS["m"], SLOTS["v"]), state, f"state of {label}")
        if group["amsgrad"] and SLOTS["vhat"] not in state:
            state = {**state, SLOTS["vhat"]: torch.zeros_like(state[SLOTS["v"]])}
        return state

    # ---- groups and state dicts ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with their own values of the options or the defaults."""
        if isinstance(param_group, dict):
            check_options(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take clones of a state dict of this class, DeepSpeed's or ``torch.optim.AdamW``; moments keep their dtype.

        Raises:
            TypeError: ``state_dict`` is not a state dict.
            ValueError: A different number or size of groups, or a step that is not a count.
        """
        check_is_dict(state_dict)
        check_structure(state_dict)
        super().load_state_dict(state_dict)  # it casts moments to the dtypes of the parameters
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, params, strict=True):
            moments = state_dict["state"].get(key, {})
            for name in SLOTS.values():
                if isinstance(moments.get(name), Tensor):
                    self.state[param][name] = moments[name].detach().to(param.device).clone()
        self._records.clear()

    def __getstate__(self) -> StateDict:
        flags = {"adam_w_mode": self.adam_w_mode, "fp32_optimizer_states": self.fp32_optimizer_states}
        return {**super().__getstate__(), **flags}

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self._records = {}
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            group.setdefault("amsgrad", False)
        for named in self.state.values():
            if isinstance(named.get("step"), Tensor):
                named["step"] = int(named["step"])


def _evaluate(closure: Callable[[], Loss] | None) -> Loss | None:
    if closure is None:
        return None
    check_closure(closure)
    with torch.enable_grad():
        return closure()


def _require_hashable(name: str, key: object) -> None:
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(f"{name}: {type(key).__name__}, expected a number") from error
